"""Runs a run directory to its end: attempt after attempt, each from the newest whole checkpoint.

The driver decides (through `attempts.decide`) and keeps the books (status.json, events.jsonl); workers train; the executor
places them. Nothing here knows Ray.

Who writes what: worker 0 appends to metrics.jsonl, evaluations.jsonl and events.jsonl (`{"event": "commit", "step": N, ...}`)
and writes outcome.json; the driver appends planned, attempt_started, attempt_ended, failure, resize, stop_requested, passed_over, fetched,
drive_ended to events.jsonl. A record of step N is of the N-th update: a checkpoint of step N holds the updates 1 to N, and
going on from it keeps the records up to and including N.
"""

import contextlib
import fcntl
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstune.atomic import read_json_lines
from dstune.checkpoint import origin
from dstune.checkpoint.remote import Store
from dstune.checkpoint.verified import Verified
from dstune.errors import EXIT_FAILED, CheckpointError, DamagedCheckpoint, DstuneError, Problem, UsageError
from dstune.launch import control, fence
from dstune.launch.attempts import RESIZE, Again, DriveLimits, Ended, Facts, Stop, Wait, can_grow, decide
from dstune.launch.failures import Cause, root_cause
from dstune.launch.follow import LineFollower, cut_back
from dstune.launch.signals import StopSignals
from dstune.launch.status import StatusFile
from dstune.loggers import get_logger
from dstune.paths import RunPaths, step_directory
from dstune.protocols import AttemptOutcome, Executor
from dstune.records.sinks import EventLog

MakePlan = Callable[[int, int, Path | None, int], object]
"""`make_plan(attempt, world_size, resume_from, start_step)` writes attempts/K/plan.json and ds_config.json."""

_COMMITTED = ("commit", "adopted", "fetched")
_LOOK_SECONDS = 0.2
_WAIT_SECONDS = 1.0
_LOCK_TRIES = 10

log = get_logger(__name__)


class Observer:
    """Hooks that look on and receive records; override what you want. Called on the driver's thread."""

    def on_step(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl, as soon as it is there."""

    def on_evaluate(self, record: dict[str, Any]) -> None:
        """A line of evaluations.jsonl."""

    def on_commit(self, record: dict[str, Any]) -> None:
        """A commit event."""

    def on_event(self, record: dict[str, Any]) -> None:
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
    store: Store | None = None,
    workers_check: bool = False,
    environment: Mapping[str, str] | None = None,
    handle_signals: bool = True,
) -> DriveEnd:
    """Start or continue the run until it succeeds, fails for good or is stopped. Returns; does not raise for a failed run.

    `checkpoints`: where commits are (default: the run directory's); `store`: where they are uploaded.
    `workers_check`: the workers check what they load (`checkpoint.loading`); where they find damage, they are started again,
    from an older checkpoint. Otherwise all of it is read before they start.
    `environment`: variables for the workers.
    `handle_signals`: SIGINT, SIGTERM, SIGUSR1 ask for a stop at the end of a step; a second SIGINT kills (main thread only).
    Raises UsageError where another driver holds the run, CheckpointError where the run committed before and nothing is whole.
    """
    paths.make()
    with contextlib.ExitStack() as stack:
        stack.enter_context(driver_lock(paths))
        control.clear_stale(paths)
        signals = stack.enter_context(StopSignals(handle_signals))
        run = _Drive(paths, executor, make_plan, limits, observe or Observer(), signals)
        run.checkpoints = checkpoints or paths.checkpoints
        run.store, run.workers_check = store, workers_check
        run.environment = dict(environment or {})
        return run.to_the_end()


@contextlib.contextmanager
def driver_lock(paths: RunPaths) -> Iterator[None]:
    """Hold the run for this process. Raises UsageError where another driver holds it."""
    with paths.lock.open("a+b") as file:
        for _ in range(_LOCK_TRIES):  # `dstune status` looks through the lock for an instant
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                threading.Event().wait(0.1)
        else:
            do = f"watch it with `dstune status {paths.root.name}`, or end it with `dstune stop {paths.root.name}`"
            raise UsageError(Problem(str(paths.root), "this run is being driven by another process", do=do))
        yield


@contextlib.contextmanager
def deserted(paths: RunPaths) -> Iterator[bool]:
    """Whether neither a driver nor a worker of the run lives; where so, none begins to work before the block ends."""
    with contextlib.ExitStack() as stack:
        nobody = True
        try:
            stack.enter_context(driver_lock(paths))
        except UsageError:
            nobody = False
        yield nobody and stack.enter_context(fence.empty(paths))


def last_attempt(paths: RunPaths) -> int:
    """The newest attempt's number; 0 before the first."""
    return max((int(p.name) for p in paths.attempts.glob("*") if p.name.isdigit()), default=0)


def _read_outcome(paths: RunPaths, attempt: int) -> dict[str, Any]:
    """What worker 0 wrote at the end of its loop; empty after a crash."""
    try:
        return json.loads(paths.outcome(attempt).read_text("utf-8"))
    except FileNotFoundError:
        return {}


class _Drive:
    """The state of one drive: what was counted, what is followed."""

    def __init__(
        self,
        paths: RunPaths,
        executor: Executor,
        make_plan: MakePlan,
        limits: DriveLimits,
        observe: Observer,
        signals: StopSignals,
    ) -> None:
        self.paths, self.executor, self.make_plan, self.limits = paths, executor, make_plan, limits
        self.observe, self.signals = observe, signals
        self.checkpoints = paths.checkpoints
        self.store: Store | None = None
        self.workers_check = False
        self.verified = Verified(paths.verified)
        self.environment: dict[str, str] = {}
        self.events = EventLog(paths.events)
        self.status = StatusFile(paths)
        self.new_events = LineFollower(paths.events)
        self.new_steps, self.new_evaluations = LineFollower(paths.metrics), LineFollower(paths.evaluations)
        self.failures_in_a_row = 0
        self.commits_seen = 0
        self.attempt = last_attempt(paths)
        self.world = 0
        self.cause: Cause | None = None
        self.stop_reason: str | None = None

    def to_the_end(self) -> DriveEnd:
        ended: Ended = "not_started"
        while True:
            decision = self._next(ended)
            if isinstance(decision, Stop):
                return self._finish(decision)
            try:
                ended = self._run_attempt(decision.world_size)
            except DstuneError as error:
                self._finish(Stop("failed", error.exit_status, str(error)))
                raise

    def _next(self, ended: Ended) -> Again | Stop:
        """Decide, waiting for workers where that is the decision."""
        began = time.monotonic()
        while True:
            self._take_signals()
            request = control.stop_requested(self.paths)
            reason = request["reason"] if request else self.stop_reason
            status = self.cause.exit_status if self.cause else None
            facts = Facts(ended, reason, status, self.failures_in_a_row, 0, 0.0)
            decision = decide(facts, self.limits)
            if isinstance(decision, Wait):  # the cluster is asked only where its answer matters: asking may start a Ray
                waited = time.monotonic() - began
                room = self.executor.available_workers() if ended == "not_started" else self._available()
                decision = decide(replace(facts, workers_available=room, waited_seconds=waited), self.limits)
            if isinstance(decision, Again | Stop):
                return decision
            self.status.write(state="queued", reason=decision.why)
            self.signals.wait(_WAIT_SECONDS)

    def _available(self) -> int:
        """Free places; none while a cluster that was there before is away (it may come back)."""
        try:
            return self.executor.available_workers()
        except UsageError as error:
            log.warning("%s", error)
            return 0

    # --- one attempt -------------------------------------------------------------------------------------------------

    def _run_attempt(self, world_size: int) -> Ended:
        fence.clear(self.paths, self.attempt)
        resume_from, start_step = self._starting_point()
        self.attempt += 1
        self.paths.attempt(self.attempt).mkdir(parents=True)
        for file in (self.paths.metrics, self.paths.evaluations):
            cut_back(file, start_step)
        self.new_steps, self.new_evaluations = LineFollower(self.paths.metrics), LineFollower(self.paths.evaluations)
        self.make_plan(self.attempt, world_size, resume_from, start_step)
        if self.world not in (0, world_size):
            self._event("resize", before=self.world, world=world_size)
        self.world, self.cause, self.stop_reason, self.commits_seen = world_size, None, None, 0
        control.clear_stale(self.paths)
        self._event("attempt_started", attempt=self.attempt, world=world_size, from_step=start_step)
        facts = {"step": start_step, "committed_step": start_step, "world": world_size, "attempt": self.attempt}
        self.status.write(state="running", reason=None, message=None, **facts)
        outcome = self._watch(world_size)
        self._look()
        return self._book(outcome)

    def _starting_point(self) -> tuple[Path | None, int]:
        """The newest whole checkpoint and its step. A run that ever committed never starts from nothing again."""
        found = origin.newest(self.checkpoints, self.store, verified=self.verified, blocks=not self.workers_check)
        for reason in found.passed_over:
            self._event("passed_over", checkpoint=reason)
        if found.checkpoint is not None:
            if self.store and found.fetched:
                self._event("fetched", step=found.checkpoint.step, store=self.store.address)
            return found.checkpoint.directory, found.checkpoint.step
        committed = self._committed_steps()
        if not committed and not found.passed_over:
            return None, 0
        said = f"the run committed step {committed[-1]}" if committed else "there are checkpoints"
        came = f"{said}, but no checkpoint is whole" + "".join(
            f"\n    {reason}" for reason in found.passed_over or ["the directory is empty"]
        )
        do = "bring a checkpoint back from a copy, or start a new run under another name; this one will not restart at step 0"
        raise CheckpointError(Problem(str(self.checkpoints), came, do=do))

    def _watch(self, world_size: int) -> AttemptOutcome:
        """Run the attempt on a thread of its own; meanwhile look after signals, records and room to grow."""
        outcomes: list[AttemptOutcome | BaseException] = []
        done = threading.Event()

        def attempt() -> None:
            try:
                outcomes.append(self.executor.run(str(self.paths.root), self.attempt, world_size, self.environment))
            except BaseException as error:  # noqa: BLE001 - carried to the driver's thread and raised there
                outcomes.append(error)
            finally:
                done.set()
                self.signals.wake()

        threading.Thread(target=attempt, name=f"attempt-{self.attempt}", daemon=True).start()
        began = looked = time.monotonic()
        while not done.is_set():
            self.signals.wait(_LOOK_SECONDS)
            self._take_signals()
            self._look()
            if time.monotonic() - looked > self.limits.grow_seconds / 4:
                looked = time.monotonic()
                self._grow(looked - began)
        outcome = outcomes[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _take_signals(self) -> None:
        for reason in self.signals.take():
            if reason == "kill":
                self._event("stop_requested", reason="kill")
                self.executor.kill()
                continue
            request = control.stop_requested(self.paths)
            if request is None or request["reason"] == RESIZE:
                control.clear(self.paths)
                control.request_stop(self.paths, reason)
                self._event("stop_requested", reason=reason)

    def _grow(self, running_seconds: float) -> None:
        if self.world >= self.limits.workers_wanted or control.stop_requested(self.paths):
            return
        if can_grow(self.world, self._available(), running_seconds, self.limits):
            control.request_stop(self.paths, RESIZE)
            self._event("stop_requested", reason=RESIZE)

    def _look(self) -> None:
        """Pass new records on to status.json and the observer."""
        for record in self.new_steps.new():
            self.status.progress(step=record["step"], loss=record.get("loss"))
            self.observe.on_step(record)
        for record in self.new_evaluations.new():
            self.observe.on_evaluate(record)
        for record in self.new_events.new():
            if record.get("event") == "commit":
                self.commits_seen += 1
                self.status.progress(committed_step=record["step"])
                self.observe.on_commit(record)
            elif record.get("event") == "removed":
                self.verified.note({}, (str(step_directory(self.checkpoints, step)) for step in record["steps"]))
            elif record.get("event") == "removed_from_store" and self.store:
                self.verified.note({}, map(self.store.address_of, record["steps"]))
            self.observe.on_event(record)

    def _book(self, outcome: AttemptOutcome) -> Ended:
        """Write down how the attempt ended, and why."""
        written = _read_outcome(self.paths, self.attempt)
        if self.commits_seen:
            self.failures_in_a_row = 0
        ended: Ended = "lost" if outcome.kind == "lost" else "failed"
        if written.get("state") in ("succeeded", "stopped"):
            ended = written["state"]
            self.status.progress(step=written["step"])
        if ended == "stopped":
            request = control.stop_requested(self.paths)
            self.stop_reason = request["reason"] if request else written.get("reason")
            control.clear(self.paths)
        elif ended in ("failed", "lost"):
            self.cause = root_cause(self.paths, self.attempt, outcome)
            if self.workers_check and self.cause.kind == DamagedCheckpoint.__name__:
                self.workers_check = False  # no failure of the workers': the next start passes the damaged one over
            else:
                self.failures_in_a_row += 1
            self._event("failure", attempt=self.attempt, outcome=outcome.kind, **self.cause.as_dict())
            log.warning("attempt %d failed: %s", self.attempt, self.cause)
        self._event("attempt_ended", attempt=self.attempt, outcome=ended, step=self.status.step)
        self._look()
        return ended

    # --- the end -----------------------------------------------------------------------------------------------------

    def _finish(self, stop: Stop) -> DriveEnd:
        control.clear(self.paths)
        message = stop.why
        if stop.state == "failed" and self.cause is not None:
            message = f"{self.cause}\n    {stop.why}" if stop.exit_status == EXIT_FAILED else str(self.cause)
        step = self.status.step if stop.state == "succeeded" else (self._committed_steps() or [0])[-1]
        self._event("drive_ended", state=stop.state, step=step, why=stop.why)
        facts = {"exit_status": stop.exit_status, "reason": stop.why, "message": message}
        self.status.write(state=stop.state, step=step, attempt=self.attempt, **facts)
        self._look()
        return DriveEnd(stop.state, step, stop.exit_status, message)

    def _committed_steps(self) -> list[int]:
        """What this directory knows to be committed, by itself or (where it was adopted) before, in the order of the events."""
        return [int(r["step"]) for r in read_json_lines(self.paths.events) if r.get("event") in _COMMITTED]

    def _event(self, kind: str, **facts: Any) -> None:
        self.events.event(kind, **facts)
