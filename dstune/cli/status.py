"""Where a run stands, wherever it was submitted, queued included."""

import argparse
from collections.abc import Iterator
from typing import Any

from dstune.cli.output import add_run, compared, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def run(args: argparse.Namespace) -> int:
    from dstune import api

    status = api.status(args.run)
    emit(args, status, _lines(status))
    return 0


def _lines(status: dict[str, Any]) -> Iterator[str]:
    for name, value in status.items():
        if value is not None and name not in ("predicted", "measured"):
            yield f"{name.replace('_', ' '):<16} {value}"
    for line in compared(status if "measured" in status else None):
        yield f"{'took':<16} {line}"
