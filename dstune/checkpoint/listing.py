"""A run's checkpoints as plain values, for tables and JSON."""

from pathlib import Path
from typing import Any

from dstune.checkpoint import resolve
from dstune.checkpoint.layout import load_manifest
from dstune.checkpoint.remote import Store, Unavailable
from dstune.errors import CheckpointError


def described(checkpoints: Path, verify: bool, address: str | None = None) -> list[dict[str, Any]]:
    """What is committed, oldest first: step, directory, problems, a verdict; of whole ones also bytes, world size, metrics.

    `address`: a store whose checkpoints are listed too, each with its own address as directory.

    `verify` reads every byte; without it problems are not looked for.
    """
    rows: list[dict[str, Any]] = []
    for one in sorted(resolve.committed(checkpoints), key=lambda checkpoint: checkpoint.step):
        problems = resolve.verify(one) if verify else []
        verdict = ("whole" if not problems else "; ".join(problems)) if verify else "committed"
        rows.append({"step": one.step, "directory": str(one.directory), "problems": problems, "verdict": verdict})
        if not problems:
            manifest = load_manifest(one.directory)
            rows[-1] |= {
                "bytes": manifest.total_bytes,
                "world_size": manifest.world_size,
                "metrics": dict(manifest.metrics),
            }
    return sorted(rows + stored(Store(address), verify), key=lambda row: row["step"]) if address else rows


def stored(store: Store, verify: bool) -> list[dict[str, Any]]:
    """The same of the checkpoints in a store; a damaged manifest is a problem even where nothing is to be verified."""
    rows: list[dict[str, Any]] = []
    for step in store.committed():
        problems = store.verify(step) if verify else []
        row: dict[str, Any] = {"step": step, "directory": store.address_of(step)}
        try:
            manifest = store.manifest(step)
            row |= {"bytes": manifest.total_bytes, "world_size": manifest.world_size, "metrics": dict(manifest.metrics)}
        except Unavailable:
            raise
        except CheckpointError as error:
            problems = problems or [str(error)]
        whole = "whole, in the store" if verify else "committed, in the store"
        rows.append(row | {"problems": problems, "verdict": "; ".join(problems) or whole})
    return rows
