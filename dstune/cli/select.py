"""Choose training data by budget, and say why: by a model's difficulty (ifd), by length and diversity, or by a draw, the control."""

import argparse

from dstune.cli.output import add_run_file, print_json, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    parser.epilog = "for instance: dstune select RUN.yaml data.select.budget=5000 data.select.by=diversity"
    parser.add_argument("--count", type=int, default=5, help="examples to show of each side (default: 5)")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from dstune import api
    from dstune.selection import report

    found = api.select(args.run, args.overrides, count=args.count, progress=not args.json)
    if args.json:
        print_json(found)
        return 0
    console = Console()
    for part in report.show(found):
        console.print(part)
    print(f"scores: {printable(found['scores'])}\nprepared: {printable(found['prepared'])}")
    print("`dstune train` with the same run file and keys takes exactly these.")
    return 0
