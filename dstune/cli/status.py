"""Where a run stands, wherever it was submitted, queued included."""

import argparse

from dstune.cli.output import add_run, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def run(args: argparse.Namespace) -> int:
    from dstune import api

    status = api.status(args.run)
    emit(args, status, [f"{name.replace('_', ' '):<16} {value}" for name, value in status.items() if value is not None])
    return 0
