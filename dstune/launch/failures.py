"""Why an attempt failed: the earliest non-collateral failure that a worker left, or a worker that left none."""

import json
from dataclasses import dataclass
from typing import Any

from dstune.paths import RunPaths
from dstune.protocols import AttemptOutcome


@dataclass(frozen=True)
class Cause:
    """The first error of an attempt."""

    rank: int | None
    node: str
    kind: str
    message: str
    traceback_file: str
    """Empty for a worker that died without a word."""
    exit_status: int | None
    """Set where the error is one of dstune's own that a restart would only meet again."""

    def __str__(self) -> str:
        place = f"worker {self.rank} on node {self.node}: " if self.rank is not None and self.traceback_file else ""
        text = f"{place}{self.kind}: {self.message}" if self.kind else f"{place}{self.message}"
        return f"{text}\n    full traceback: {self.traceback_file}" if self.traceback_file else text

    def as_dict(self) -> dict[str, Any]:
        return {"rank": self.rank, "node": self.node, "error": self.kind, "message": self.message}


def failures(paths: RunPaths, attempt: int) -> list[dict[str, Any]]:
    """Every worker's failure of `attempt`, earliest first."""
    found: list[dict[str, Any]] = []
    for file in sorted(paths.attempt(attempt).glob("failure-*.json")):
        try:
            found.append(json.loads(file.read_text("utf-8")))
        except ValueError:  # a worker that died while writing it left no failure
            continue
    return sorted(found, key=lambda failure: float(failure.get("time", 0)))


def root_cause(paths: RunPaths, attempt: int, outcome: AttemptOutcome) -> Cause:
    """The error that the others followed from.

    A worker that raised wrote it down; a worker that was killed could not, and then the others' broken connections are
    collateral. Order: the earliest error that is not collateral, a worker that died, the executor's own words, collateral.
    """
    found = failures(paths, attempt)
    own = [failure for failure in found if not failure.get("collateral")]
    if own:
        return _from_file(paths, own[0])
    silent = [rank for rank in outcome.failed_ranks if rank not in {failure.get("rank") for failure in found}]
    if outcome.message or not found:
        message = outcome.message or "the workers ended without saying how"
        return Cause(silent[0] if silent else None, "", "", message, "", None)
    return _from_file(paths, found[0])


def _from_file(paths: RunPaths, failure: dict[str, Any]) -> Cause:
    rank, kind = int(failure["rank"]), str(failure.get("kind", ""))
    return Cause(
        rank,
        str(failure.get("node", "")),
        kind,
        str(failure.get("message", "")),
        str(paths.rank_error(rank)),
        failure.get("exit_status"),
    )
