"""Look at conversations as the model will see them: trained tokens coloured, drops and their reasons, sources, fill."""

import argparse

from dstune.cli.output import add_run_file, emit, print_json
from dstune.errors import Problem, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser, "run file or prepared directory")
    parser.add_argument("--html", metavar="FILE", help="write it all as one page for the browser, with histograms")
    parser.add_argument(
        "--overwrite", action="store_true", help="with --html: FILE may be any file, not just such a page"
    )
    parser.add_argument(
        "--count", type=int, help="conversations to show (default: 5; with --html 20, and the extremes)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which ones")


def run(args: argparse.Namespace) -> int:
    if args.seed < 0:
        raise UsageError(Problem("--seed", str(args.seed), "0 or more"))
    return _html(args) if args.html else _here(args)


def _html(args: argparse.Namespace) -> int:
    from dstune import api

    count = 20 if args.count is None else args.count
    path = api.preview_html(
        args.run, args.overrides, file=args.html, count=count, seed=args.seed, overwrite=args.overwrite
    )
    emit(args, {"html": str(path)}, [str(path)])
    return 0


def _here(args: argparse.Namespace) -> int:
    from rich.console import Console

    from dstune import api

    count = 5 if args.count is None else args.count
    if args.json:
        print_json(api.preview_json(args.run, args.overrides, count=count, seed=args.seed))
        return 0
    console = Console()
    for part in api.preview(args.run, args.overrides, count=count, seed=args.seed):
        console.print(part)
    console.print(
        "histograms, rows, rejects and every token, in the browser: add --html FILE", style="dim", markup=False
    )
    return 0
