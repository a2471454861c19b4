"""What is committed (list), and whether every byte is right (verify)."""

import argparse

from dstune.cli.output import add_run, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "verify"))
    add_run(parser)


def run(args: argparse.Namespace) -> int:
    from dstune import api

    found = api.checkpoints(args.run, verify=args.action == "verify")
    lines = [
        f"step {one['step']:>8}  {one['bytes'] / 1e6:>10.1f} MB  world {one['world_size']:<4} {one['verdict']}"
        for one in found
    ]
    emit(args, {"checkpoints": found}, lines or ["nothing is committed"])
    return 1 if any(one["problems"] for one in found) else 0
