"""A run's checkpoints as plain values, for tables and JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstune.checkpoint.audit import Finding, audit, glance
from dstune.checkpoint.hashing import OnBytes
from dstune.checkpoint.keeping import Found, Rules, decide, presumed
from dstune.checkpoint.layout import Manifest
from dstune.checkpoint.leftovers import tree_bytes
from dstune.checkpoint.remote import Store
from dstune.checkpoint.resolve import committed
from dstune.checkpoint.verified import NO_RECORD, Verified, stamp_of


def local(
    checkpoints: Path,
    read: bool,
    on_bytes: OnBytes | None = None,
    only: int | None = None,
    verified: Verified = NO_RECORD,
) -> list[dict[str, Any]]:
    """What is committed in a directory (or the step `only`), oldest first. `read`: every byte, past the page cache.

    `verified`: true (every byte is right; `verified_at`: when it was read, remembered in the record `verified` for as long as no
    file changes), false (see `problems`) or null (nothing wrong at a glance).
    """
    found = [one for one in committed(checkpoints) if only in (None, one.step)]
    directories = [one.directory for one in found]
    stamps = {str(directory): stamp_of(directory) for directory in directories}
    audits = audit(directories, past_cache=True, on_bytes=on_bytes) if read else map(glance, directories)
    rows = []
    for one, look in zip(found, audits, strict=True):
        size = look.manifest.total_bytes if look.manifest else tree_bytes(one.directory)
        rows.append(_row(one.step, str(one.directory), size, look.manifest, look.findings, read))
    return _remembered(rows, stamps, read, verified)


def stored(
    store: Store,
    read: bool,
    on_bytes: OnBytes | None = None,
    only: int | None = None,
    verified: Verified = NO_RECORD,
) -> list[dict[str, Any]]:
    """The same of a store, each with its address as `directory`. Raises objects.Unavailable."""
    rows: list[dict[str, Any]] = []
    stamps: dict[str, str | None] = {}
    for step in [step for step in store.committed() if only in (None, step)]:
        stamps[store.address_of(step)] = store.stamp(step)
        manifest, findings = store.glance(step)
        if read and not findings:
            findings = store.verify(step, on_bytes=on_bytes)
        size = manifest.total_bytes if manifest else 0
        rows.append(_row(step, store.address_of(step), size, manifest, findings, read))
    return _remembered(rows, stamps, read, verified)


def _remembered(
    rows: list[dict[str, Any]], stamps: Mapping[str, str | None], read: bool, verified: Verified
) -> list[dict[str, Any]]:
    """Remember what was `read` now, and say of the others what was remembered: `verified_at`."""
    if read:
        whole = {row["directory"]: stamps[row["directory"]] for row in rows if row["verified"]}
        now = verified.note(whole, (row["directory"] for row in rows if not row["verified"]))
        return [row | {"verified_at": now if row["verified"] else None} for row in rows]
    for row in rows:
        then = verified.when(row["directory"], stamps[row["directory"]]) if row["verified"] is None else None
        row |= {"verified": True if then else row["verified"], "verified_at": then}
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
