"""A run's checkpoints as plain values, for tables and JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstune.checkpoint.audit import Audit, Finding, audit, glance
from dstune.checkpoint.hashing import OnBytes
from dstune.checkpoint.keeping import Found, Rules, decide, presumed
from dstune.checkpoint.layout import Manifest
from dstune.checkpoint.leftovers import left_overs, tree_bytes
from dstune.checkpoint.remote import Store
from dstune.checkpoint.resolve import Checkpoint, committed


def described(checkpoints: Path, rules: Rules, verify: bool, on_bytes: OnBytes | None = None) -> dict[str, Any]:
    """`checkpoints`: what is committed, oldest first, and why each is kept; `left_overs`: what else stands there.

    `verify` reads every byte; without it names, sizes and the manifests' own hashes are looked at.
    """
    found = committed(checkpoints)
    directories = [one.directory for one in found]
    audits = list(audit(directories, past_cache=True, on_bytes=on_bytes) if verify else map(glance, directories))
    rows = [row(one, look, verify) for one, look in zip(found, audits, strict=True)]
    add_reasons(rows, rules)
    rest = [{"name": one.path.name, "kind": one.kind, "bytes": one.bytes} for one in left_overs(checkpoints)]
    return {"directory": str(checkpoints), "checkpoints": rows, "left_overs": rest}


def row(checkpoint: Checkpoint, look: Audit, read: bool) -> dict[str, Any]:
    """One checkpoint. `verified`: true (every byte is right), false (see `problems`) or null (nothing wrong at a glance)."""
    size = look.manifest.total_bytes if look.manifest else tree_bytes(checkpoint.directory)
    return _row(checkpoint.step, str(checkpoint.directory), size, look.manifest, look.findings, read)


def stored(store: Store, read: bool, on_bytes: OnBytes | None = None, only: int | None = None) -> list[dict[str, Any]]:
    """The checkpoints in a store (or the step `only`) as such rows, each with its address as `directory`. `read`: every byte."""
    rows: list[dict[str, Any]] = []
    for step in [step for step in store.committed() if only in (None, step)]:
        manifest, findings = store.glance(step)
        if read and not findings:
            findings = store.verify(step, on_bytes=on_bytes)
        size = manifest.total_bytes if manifest else 0
        rows.append(_row(step, store.address_of(step), size, manifest, findings, read))
    return rows


def add_reasons(rows: Sequence[dict[str, Any]], rules: Rules) -> None:
    """Put `kept_because` into the rows of one place, oldest first."""
    facts = [Found(line["step"], line["verified"], line["metrics"].get(rules.best)) for line in rows]
    for line, verdict in zip(rows, decide(presumed(facts), rules), strict=True):
        line["kept_because"] = list(verdict.reasons)


def _row(
    step: int, place: str, size: int, manifest: Manifest | None, findings: Sequence[Finding], read: bool
) -> dict[str, Any]:
    return {
        "step": step,
        "directory": place,
        "time": manifest.time if manifest else None,
        "bytes": size,
        "world_size": manifest.world_size if manifest else None,
        "metrics": dict(manifest.metrics) if manifest else {},
        "verified": False if findings else True if read else None,
        "problems": [finding.as_dict() | {"text": str(finding)} for finding in findings],
    }
