"""What comes after an attempt: a pure function from facts to a decision. No file, clock, process or cluster is touched here."""

from dataclasses import dataclass
from typing import Literal

from dstune.errors import EXIT_DONE, EXIT_FAILED, EXIT_FIT, EXIT_STOPPED

Ended = Literal["not_started", "succeeded", "stopped", "failed", "lost"]

RESIZE = "resize"
"""The reason of a stop that the driver itself asks for, to go on with more workers."""

PREEMPTED = "preempted"
"""The reason of a stop that the place asked for (a preemption, a time limit)."""


@dataclass(frozen=True)
class DriveLimits:
    """What bounds a drive: how many workers, how many failures, how long to wait for workers."""

    workers_wanted: int
    """The world of an attempt where the cluster has room for it."""
    workers_min: int
    """The smallest world worth running; equal to `workers_wanted` for a run of fixed size."""
    max_failures: int = 3
    """Automatic restarts after failures that made no new commit in between."""
    settle_seconds: float = 20.0
    """How long to hope for `workers_wanted` before going on with fewer (a node that restarts, a slot being freed)."""
    wait_seconds: float = 600.0
    """How long to wait for `workers_min` before giving up."""
    grow_seconds: float = 120.0
    """How long a smaller world runs at least before it is stopped, at a commit, to grow again."""
    group: int = 1
    """Workers that share rows: a world is a multiple of it, as `workers_wanted` and `workers_min` are."""


@dataclass(frozen=True)
class Facts:
    """Everything the decision depends on."""

    ended: Ended
    """How the last attempt ended; `stopped` = the workers agreed on it and committed."""
    stop_reason: str | None
    """Why a stop was asked for (`interrupt`, `terminate`, `preempted`, `stop`, `resize`); None: nobody asked."""
    cause_status: int | None
    """Exit status of the root cause, where the next attempt would only meet it again; None for all other causes."""
    failures_in_a_row: int
    """Failed attempts since the last new commit, this one included."""
    workers_available: int
    """How many workers could be placed now."""
    waited_seconds: float
    """How long the driver has been waiting for workers since the last attempt."""


@dataclass(frozen=True)
class Again:
    """Start the next attempt with this many workers."""

    world_size: int


@dataclass(frozen=True)
class Wait:
    """Look again in a moment: the cluster has too few free places."""

    why: str


@dataclass(frozen=True)
class Stop:
    """The drive is over."""

    state: Literal["succeeded", "failed", "stopped", "preempted"]
    exit_status: int
    why: str


Decision = Again | Wait | Stop


def decide(facts: Facts, limits: DriveLimits) -> Decision:
    """What the driver does next."""
    if facts.ended == "succeeded":
        return Stop("succeeded", EXIT_DONE, "every step is done")
    if facts.ended in ("failed", "lost") and facts.cause_status is not None:
        return Stop("failed", facts.cause_status, "the same error would come again")
    if facts.stop_reason is not None and facts.stop_reason != RESIZE:
        return _stopped(facts.stop_reason)
    if facts.ended == "stopped" and facts.stop_reason is None:
        return Stop("stopped", EXIT_STOPPED, "the workers stopped early")
    if facts.ended in ("failed", "lost") and facts.failures_in_a_row > limits.max_failures:
        return Stop("failed", EXIT_FAILED, _too_many(facts.failures_in_a_row))
    return _place(facts, limits)


def can_grow(world_size: int, free_workers: int, running_seconds: float, limits: DriveLimits) -> bool:
    """True where a running attempt should stop at a commit and go on with more workers."""
    return (
        world_size < limits.workers_wanted and free_workers >= limits.group and running_seconds >= limits.grow_seconds
    )


def _stopped(reason: str) -> Stop:
    state = "preempted" if reason == PREEMPTED else "stopped"
    return Stop(state, EXIT_STOPPED, f"a stop was asked for ({reason})")


def _too_many(failures: int) -> str:
    if failures == 1:
        return "it failed, and cluster.max_failures allows no restart"
    return f"{failures} attempts in a row failed without a new commit (cluster.max_failures)"


def _place(facts: Facts, limits: DriveLimits) -> Decision:
    """As many workers as wanted; fewer once they have not come within the settling time; none: wait, then give up."""
    available, waited = facts.workers_available - facts.workers_available % limits.group, facts.waited_seconds
    if available >= limits.workers_wanted:
        return Again(limits.workers_wanted)
    short = f"{facts.workers_available} of {limits.workers_wanted} workers can be placed now"
    if available >= limits.workers_min:
        return Again(available) if waited >= limits.settle_seconds else Wait(short)
    if waited < limits.wait_seconds:
        return Wait(short)
    return Stop("failed", EXIT_FIT, f"{short}, at least {limits.workers_min} are needed")
