"""Prepare if needed, plan, then train here: on an embedded Ray, or on the cluster this machine is in (--address auto).

A run that was started already is refused; one of which nothing is left but the checkpoints in `checkpoint.dir` goes on from them.
"""

import argparse

from dstune.cli.output import add_run_file, report_end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument(
        "--address", help="a Ray cluster (`auto`: the one this machine is in); default: an embedded Ray"
    )


def run(args: argparse.Namespace) -> int:
    from dstune import api

    return report_end(args, api.train(args.run, args.overrides, address=args.address, progress=not args.json))
