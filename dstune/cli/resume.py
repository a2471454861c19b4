"""Go on from the newest committed step, on any number of workers. Overrides may change what does not touch the data order.

Of a run whose directory is lost, give the run file: it goes on from the checkpoints in `checkpoint.dir`.
"""

import argparse

from dstune.cli.output import add_run, emit, report_end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="cluster.workers=2 and the like")
    parser.add_argument(
        "--address", help="a Ray cluster (`auto`: the one this machine is in); default: an embedded Ray"
    )
    parser.add_argument("--to", choices=("ray", "slurm"), help="resume as a Ray job or a Slurm batch")
    parser.add_argument("--site", help="site file for --to")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    if args.to:
        sent = api.resubmit(args.run, args.to, args.overrides, site=args.site, address=args.address)
        emit(args, sent, [f"submitted: {sent['id']}", f"see: dstune status {sent['run_directory']}"])
        return 0
    return report_end(args, api.resume(args.run, args.overrides, address=args.address, progress=not args.json))
