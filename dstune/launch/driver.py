"""Runs a run directory to its end: attempt after attempt, each from the newest whole checkpoint.

The driver decides (through `attempts.decide`) and keeps the books (status.json, events.jsonl); workers train; the executor
places them. Nothing here knows Ray.

Who writes what: worker 0 appends to metrics.jsonl, evaluations.jsonl and events.jsonl (`{"event": "commit", "step": N, ...}`)
and writes outcome.json; the driver appends attempt_started, attempt_ended, failure, resize, stop_requested, passed_over, drive_ended to
events.jsonl. A record of step N is of the N-th update: a checkpoint of step N holds the updates 1 to N, and going on from it
keeps the records up to and including N.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.launch.attempts import DriveLimits
from dstune.paths import RunPaths
from dstune.protocols import Executor

MakePlan = Callable[[int, int, Path | None, int], None]
"""`make_plan(attempt, world_size, resume_from, start_step)` writes attempts/K/plan.json and ds_config.json."""


class Observer:
    """Hooks that look on and receive records; override what you want. Called on the driver's main thread."""

    def on_step(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, as soon as it is there."""

    def on_evaluate(self, record: Mapping[str, Any]) -> None:
        """A line of evaluations.jsonl."""

    def on_commit(self, record: Mapping[str, Any]) -> None:
        """A commit event."""

    def on_event(self, record: Mapping[str, Any]) -> None:
        """Every line of events.jsonl, commits among them."""


@dataclass(frozen=True)
class DriveEnd:
    """How a drive ended."""

    state: str
    """`succeeded`, `failed`, `stopped` or `preempted`."""
    step: int
    """The last step that is done (succeeded) or committed (otherwise: where a resume goes on)."""
    exit_status: int
    """0, 1, 2, 3, 4 or 75."""
    message: str = ""
    """For `failed`: the first non-collateral error of all ranks, with rank, node and the file of its traceback."""


def drive(
    paths: RunPaths,
    executor: Executor,
    make_plan: MakePlan,
    limits: DriveLimits,
    observe: Observer | None = None,
    *,
    checkpoints: Path | None = None,
    environment: Mapping[str, str] | None = None,
    handle_signals: bool = True,
) -> DriveEnd:
    """Start or continue the run until it succeeds, fails for good or is stopped. Returns; does not raise for a failed run.

    `checkpoints`: where commits are (default: the run directory's). `environment`: variables for the workers.
    `handle_signals`: SIGINT, SIGTERM, SIGUSR1 ask for a stop at the end of a step; a second SIGINT kills (main thread only).
    Raises UsageError where another driver holds the run, CheckpointError where the run committed before and nothing is whole.
    """
    raise NotImplementedError
