"""What is committed (list), and whether every byte is right (verify)."""

import argparse
from typing import Any

from dstune.cli.output import add_run, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "verify"))
    add_run(parser)


def run(args: argparse.Namespace) -> int:
    from dstune import api

    found = api.checkpoints(args.run, verify=args.action == "verify")
    lines = [_line(one) for one in found]
    emit(args, {"checkpoints": found}, lines or ["nothing is committed"])
    return 1 if any(one["problems"] for one in found) else 0


def _line(one: dict[str, Any]) -> str:
    size = f"{one['bytes'] / 1e6:>10.1f} MB  world {one['world_size']:<4}" if "bytes" in one else " " * 25
    return f"step {one['step']:>8}  {size} {one['verdict']}"
