"""Raw instruction files -> a prepared directory: packed Arrow shards with exact masks, a manifest, and every reject by line."""

import argparse
import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dstune.cli.output import add_run_file, emit

if TYPE_CHECKING:
    from dstune.data.shards import Prepared


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_file(parser)


def run(args: argparse.Namespace) -> int:
    from dstune import api
    from dstune.data.pool import GC_THRESHOLDS

    gc.set_threshold(*GC_THRESHOLDS)
    prepared = api.prepare(args.run, args.overrides, progress=not args.json)
    sources = prepared.manifest["sources"]
    held_out = prepared.validation()
    document = {
        "prepared": str(prepared.root),
        "counts": prepared.manifest["counts"],
        "sources": sources,
        "notes": prepared.manifest["encoding"].get("notes", []),
        "validation": held_out.manifest["counts"] if held_out else None,
    }
    emit(args, document, [*_lines(prepared, held_out), f"prepared: {prepared.root}"])
    return 0


def _lines(prepared: "Prepared", held_out: "Prepared | None") -> Iterator[str]:
    """What came in, what was left out and why, what is there now."""
    dropped: dict[str, int] = {}
    for source in prepared.manifest["sources"]:
        records = source["records"]
        yield f"{source['path']}: {records['read']:,} records read, {records['used']:,} used"
        for part in (records["dropped"], source["conversations"]["dropped"]):
            for reason, number in part.items():
                dropped[reason] = dropped.get(reason, 0) + number
    if dropped:
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items())
        yield f"left out: {reasons}; each with file, line and reason in {prepared.root / 'rejects.jsonl'}"
    yield _totals("training", prepared.manifest["counts"])
    if held_out:
        yield _totals("held out", held_out.manifest["counts"])
    for note in prepared.manifest["encoding"].get("notes", []):
        yield f"note: {note}"


def _totals(what: str, counts: dict[str, Any]) -> str:
    return (
        f"{what}: {counts['examples']:,} examples in {counts['rows']:,} rows ({counts['fill']:.1%} full), "
        f"{counts['tokens']:,} tokens, {counts['supervised_tokens']:,} of them trained"
    )
