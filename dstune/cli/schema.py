"""JSON Schema of the run file, for editors that complete and check YAML."""

import argparse

from dstune.cli.output import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", action="store_true", help="of the site file instead")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    print_json(api.schema(site=args.site))
    return 0
