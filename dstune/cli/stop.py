"""Ask a run to stop at the end of its step, with a checkpoint; `dstune resume` goes on from it."""

import argparse

from dstune.cli.output import add_run, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--wait", action="store_true", help="return when it has stopped")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    status = api.stop(args.run, wait=args.wait)
    word = "stopped" if args.wait else "asked to stop"
    emit(args, status, [f"{word}: {status['state']} at step {status['step']}"])
    return 0
