"""Start or continue a run directory, whatever its state: what a Slurm batch or a Ray job executes."""

import argparse

from dstune.cli.output import report_end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_directory")
    parser.add_argument("--address", help="a Ray cluster; default: an embedded Ray")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    return report_end(args, api.drive(args.run_directory, address=args.address, progress=not args.json))
