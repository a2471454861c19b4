"""Generate answers to held-out tasks and score them."""

import argparse

from dstune.cli.output import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="an exported directory or a hub id")
    parser.add_argument("tasks", help="tasks file (YAML)")
    parser.add_argument("--out", help="directory for results.json and outputs.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace results that are in --out already")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    results = api.evaluate(args.model, args.tasks, out=args.out, overwrite=args.overwrite)
    if args.json:
        print_json(results)
        return 0
    from rich.console import Console

    Console().print(api.results_table(results))
    return 0
