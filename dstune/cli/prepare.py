"""Raw instruction files -> a prepared directory: packed Arrow shards with exact masks, a manifest, and every reject by line."""

import argparse

from dstune.cli.output import add_run_file, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)


def run(args: argparse.Namespace) -> int:
    from dstune import api

    prepared = api.prepare(args.run, args.overrides, progress=not args.json)
    counts = prepared.manifest["counts"]
    lines = [f"{name.replace('_', ' '):<20} {value}" for name, value in counts.items() if not isinstance(value, dict)]
    emit(args, {"prepared": str(prepared.root), "counts": counts}, [*lines, f"prepared: {prepared.root}"])
    return 0
