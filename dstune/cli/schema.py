"""JSON Schema of the run file, for editors that complete and check YAML."""

import argparse

from dstune.cli.output import print_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", default="run", choices=("run", "site", "tasks"), help="which file (default: run)"
    )


def run(args: argparse.Namespace) -> int:
    from dstune import api

    print_json(api.schema(args.file))
    return 0
