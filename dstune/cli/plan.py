"""What a run would do, without starting it: steps, micro-batches, tokens, and the full DeepSpeed config."""

import argparse

from dstune.cli.output import add_run_file, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument("--workers", type=int, help="plan for so many workers (default: the run file's)")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    plan = api.plan(args.run, args.overrides, workers=args.workers)
    lines = [f"{name.replace('_', ' '):<22} {value}" for name, value in plan.items() if not isinstance(value, dict)]
    emit(
        args,
        plan,
        [
            *lines,
            "DeepSpeed config (dstune feeds and weighs the forward passes, so its batch sizes stay 1):",
            *_indented(plan["deepspeed"]),
        ],
    )
    return 0


def _indented(config: dict[str, object]) -> list[str]:
    from dstune.atomic import dump_json

    return ["  " + line for line in dump_json(config).splitlines()]
