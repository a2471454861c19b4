"""The same run elsewhere: as a Ray job, or as a Slurm batch. --dry-run prints exactly what would be sent."""

import argparse

from dstune.cli.output import add_run_file, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)
    parser.add_argument("--to", choices=("ray", "slurm"), required=True)
    parser.add_argument(
        "--address", help="Ray's job server, http://HOST:PORT (default: the site's, or RAY_API_SERVER_ADDRESS)"
    )
    parser.add_argument("--site", help="site file: partition, account, time limit, setup lines")
    parser.add_argument("--dry-run", action="store_true", help="print what would be sent, send nothing")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    sent = api.submit(args.run, args.to, args.overrides, site=args.site, address=args.address, dry_run=args.dry_run)
    if args.dry_run:
        emit(args, sent, [sent["would_send"]])
        return 0
    emit(args, sent, [f"submitted: {sent['id']}", f"see: dstune status {sent['run_directory']}"])
    return 0
