"""A run's checkpoints as plain values, for tables and JSON."""

from pathlib import Path
from typing import Any

from dstune.checkpoint.audit import Audit, audit, glance
from dstune.checkpoint.hashing import OnBytes
from dstune.checkpoint.keeping import Found, Rules, decide, presumed
from dstune.checkpoint.leftovers import left_overs, tree_bytes
from dstune.checkpoint.resolve import Checkpoint, committed


def described(checkpoints: Path, rules: Rules, verify: bool, on_bytes: OnBytes | None = None) -> dict[str, Any]:
    """`checkpoints`: what is committed, oldest first, and why each is kept; `left_overs`: what else stands there.

    `verify` reads every byte; without it names, sizes and the manifests' own hashes are looked at.
    """
    found = committed(checkpoints)
    directories = [one.directory for one in found]
    audits = list(audit(directories, past_cache=True, on_bytes=on_bytes) if verify else map(glance, directories))
    rows = [row(one, look, verify) for one, look in zip(found, audits, strict=True)]
    facts = [Found(line["step"], line["verified"], line["metrics"].get(rules.best)) for line in rows]
    for line, verdict in zip(rows, decide(presumed(facts), rules), strict=True):
        line["kept_because"] = list(verdict.reasons)
    rest = [{"name": one.path.name, "kind": one.kind, "bytes": one.bytes} for one in left_overs(checkpoints)]
    return {"directory": str(checkpoints), "checkpoints": rows, "left_overs": rest}


def row(checkpoint: Checkpoint, look: Audit, read: bool) -> dict[str, Any]:
    """One checkpoint. `verified`: true (every byte is right), false (see `problems`) or null (nothing wrong at a glance)."""
    manifest = look.manifest
    return {
        "step": checkpoint.step,
        "directory": str(checkpoint.directory),
        "time": manifest.time if manifest else None,
        "bytes": manifest.total_bytes if manifest else tree_bytes(checkpoint.directory),
        "world_size": manifest.world_size if manifest else None,
        "metrics": dict(manifest.metrics) if manifest else {},
        "verified": False if look.findings else True if read else None,
        "problems": [finding.as_dict() | {"text": str(finding)} for finding in look.findings],
    }
