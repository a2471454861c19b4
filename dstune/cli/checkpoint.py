"""What is committed (list), whether every byte is right (verify), and DeepSpeed's own checkpoints in (import)."""

import argparse
from typing import Any

from dstune.cli.output import add_run, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "verify", "import"))
    add_run(parser)
    parser.add_argument("source", nargs="?", metavar="DEEPSPEED_DIR", help="import: what save_checkpoint was given")
    parser.add_argument("--tag", help="import: a save in it (default: the one that `latest` names)")
    parser.add_argument(
        "--step", type=int, metavar="N", help="import: where the run then stands (default: DeepSpeed's count)"
    )
    parser.add_argument(
        "--skip-objects", action="store_true", help="import: read past objects that are not DeepSpeed's"
    )


def run(args: argparse.Namespace) -> int:
    from dstune import api

    if args.action == "import":
        return _import(args)
    found = api.checkpoints(args.run, verify=args.action == "verify")
    lines = [_line(one) for one in found]
    emit(args, {"checkpoints": found}, lines or ["nothing is committed"])
    return 1 if any(one["problems"] for one in found) else 0


def _import(args: argparse.Namespace) -> int:
    from dstune import api
    from dstune.errors import UsageError

    if args.source is None:
        raise UsageError("dstune checkpoint import RUN DEEPSPEED_DIR: which checkpoint?")
    made = api.import_deepspeed(args.run, args.source, tag=args.tag, step=args.step, skip_objects=args.skip_objects)
    lines = [
        f"step {made['step']}: {made['parameters']:,} parameters of ZeRO-{made['stage']} on {made['world_size']} workers"
    ]
    lines += [f"note: {note}" for note in made["notes"]]
    emit(args, made, [*lines, f"next: dstune resume {made['run']}"])
    return 0


def _line(one: dict[str, Any]) -> str:
    size = f"{one['bytes'] / 1e6:>10.1f} MB  world {one['world_size']:<4}" if "bytes" in one else " " * 25
    return f"step {one['step']:>8}  {size} {one['verdict']}"
