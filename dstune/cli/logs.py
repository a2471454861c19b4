"""What the driver and the workers of a run said."""

import argparse

from dstune.cli.output import add_run, print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")
    parser.add_argument("--rank", type=int, help="one worker's log in place of the driver's")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    lines = api.logs(args.run, follow=args.follow, rank=args.rank)
    if args.json:
        print_json({"lines": list(lines)})
        return 0
    for line in lines:
        print(line, flush=True)
    return 0
