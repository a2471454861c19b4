"""A run's checkpoints as plain values, for tables and JSON."""

from pathlib import Path
from typing import Any

from dstune.checkpoint import resolve
from dstune.checkpoint.layout import load_manifest


def described(checkpoints: Path, verify: bool) -> list[dict[str, Any]]:
    """What is committed, oldest first: step, directory, problems, a verdict; of whole ones also bytes, world size, metrics.

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
    return rows
