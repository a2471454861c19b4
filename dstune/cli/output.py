"""How commands answer: lines for a person, or one JSON document."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dstune.api import RunResult


def add_run_file(parser: argparse.ArgumentParser, what: str = "run file") -> None:
    parser.add_argument("run", metavar="RUN.yaml", help=what)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="put over the file: train.lr=1e-5")


def add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run file, a run's name or its directory")


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def emit(args: argparse.Namespace, value: Any, lines: Iterable[str]) -> None:
    """Print `value` as JSON where it was asked for, else the lines."""
    if args.json:
        print_json(value)
        return
    for line in lines:
        print(printable(line))


def printable(text: str) -> str:
    """`text` with control characters (but line ends) spelled out: a file's name must not drive the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def report_end(args: argparse.Namespace, result: "RunResult") -> int:
    """Say how a run ended and what to do next; its exit status."""
    if args.json:
        print_json(result.as_dict())
    elif result.state == "succeeded":
        for line in compared(result.compared):
            print(line)
        print(f"done: step {result.step}, {result.directory}\nnext: dstune export {result.directory}")
    elif result.exit_status == 75:
        print(f"{result.state} at step {result.step}; go on with: dstune resume {result.directory}", file=sys.stderr)
    else:
        print(f"dstune: {result.message}", file=sys.stderr)
        if result.step > 0:
            print(f"step {result.step} is committed; go on with: dstune resume {result.directory}", file=sys.stderr)
    return result.exit_status


def compared(found: Mapping[str, Any] | None) -> list[str]:
    """What a run took beside what was predicted; nothing where nothing was."""
    if not found:
        return []
    from dstune.launch.comparison import lines

    return list(lines(found))
