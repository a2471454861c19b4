"""Look at conversations as the model will see them: trained tokens coloured, drops and their reasons, sources, fill."""

import argparse

from dstune.cli.output import add_run_file, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser, "run file or prepared directory")
    parser.add_argument("--count", type=int, default=5, help="conversations to show (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="which ones")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from dstune import api

    if args.json:
        print_json(api.preview_json(args.run, args.overrides, count=args.count, seed=args.seed))
        return 0
    console = Console()
    for part in api.preview(args.run, args.overrides, count=args.count, seed=args.seed):
        console.print(part)
    return 0
