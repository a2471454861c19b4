"""Saving while training goes on: it waits for a copy into host memory, and the rest happens behind it, on a thread of its own."""

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from dstune.checkpoint.commit import CommitRecord, Intent, WriteShard
from dstune.checkpoint.home import Home, NotPublished
from dstune.checkpoint.host_memory import available_bytes
from dstune.checkpoint.keeping import Rules
from dstune.checkpoint.shard_writer import ShardWriter
from dstune.config.schema import CheckpointSection
from dstune.errors import CheckpointError
from dstune.loggers import get_logger
from dstune.protocols import MODEL_STATES, Control, Engine, Slice
from dstune.training.state import TrainState

log = get_logger(__name__)

_SHARE_OF_MEMORY = 0.8
"""Of what a machine has left, that its workers' copies may take."""
_NICE = 10
"""How far the saving thread steps back from the training's."""


class Events(Protocol):
    """Where worker 0 tells of commits."""

    def event(self, kind: str, **facts: Any) -> None: ...


class CheckpointSaver:
    """Commits checkpoints of one run, tells the events, and lets old ones go. A collective object; one save at a time.

    `behind` is a control group that only the saving thread uses: it agrees with the other workers' while they train.
    """

    def __init__(
        self,
        settings: CheckpointSection,
        home: Home,
        engine: Engine,
        control: Control,
        *,
        behind: Control,
        fingerprints: Mapping[str, Any],
        events: Events,
        pinned: bool = False,
    ) -> None:
        self._settings, self._home, self._engine = settings, home, engine
        self._control, self._behind, self._fingerprints = control, behind, fingerprints
        self._events, self._pinned = events, pinned
        self._writer: ShardWriter | None = None
        self._copies = False
        self._saving: tuple[int, Future[None]] | None = None

    def save(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Begin to commit `state`, with those metrics that are finite.

        Raises CheckpointError on every worker where a save failed and `on_error` is `stop`.
        """
        began = time.monotonic()
        self.settle()
        writer = self._ready()
        value = state.to_json() | {"engine": self._engine.extra_state()}
        known = {name: value for name, value in metrics.items() if math.isfinite(value)}  # JSON has no NaN
        intent = Intent(state.step, value, self._fingerprints, known)
        if self._copies:
            writer.copy()
            waited = time.monotonic() - began
            self._saving = state.step, _on_a_thread(lambda: self._commit(intent, writer.write, self._behind, waited))
            return
        with self._told(state.step):
            self._commit(intent, writer.stream, self._control, None)

    def catch_up(self, step: int) -> None:
        """Upload the checkpoint that the run goes on from, where an attempt before could not: behind the training, as a save."""
        assert self._saving is None
        if self._home.store is not None and self._home.shared:
            self._saving = step, _on_a_thread(lambda: self._publish(step, self._behind))

    def failed(self) -> bool:
        """Whether the save under way has failed here."""
        return self._saving is not None and self._saving[1].done() and self._saving[1].exception() is not None

    def settle(self) -> None:
        """Wait for the save under way. Raises as `save` does."""
        if self._saving is not None:
            (step, saving), self._saving = self._saving, None
            with self._told(step):
                saving.result()

    def _ready(self) -> ShardWriter:
        """The writer; in the first save all workers decide whether there is room for copies."""
        if self._writer is None:
            self._writer = ShardWriter(self._slices, self._pinned)
            self._copies = self._decide(self._writer.num_bytes)
            if self._copies:
                self._writer.reserve()
        return self._writer

    def _slices(self) -> Iterator[Slice]:
        return (one for one in self._engine.slices() if one.state in MODEL_STATES or not self._settings.weights_only)

    def _decide(self, num_bytes: int) -> bool:
        if self._settings.background != "auto":
            return self._settings.background
        mine = {"node": socket.gethostname(), "needs": num_bytes, "left": available_bytes()}
        nodes: dict[str, list[dict[str, Any]]] = {}
        for one in self._control.gather(mine):
            nodes.setdefault(one["node"], []).append(one)
        for node, workers in nodes.items():
            needs, left = sum(one["needs"] for one in workers), min(one["left"] for one in workers)
            if needs > _SHARE_OF_MEMORY * left:
                came = f"copies for saving behind the training take {needs / 1e9:.1f} GB on {node}, {left / 1e9:.1f} GB are left"
                log.warning("%s: the training waits for each save", came)
                if self._control.rank == 0:
                    self._events.event("saving_in_the_foreground", node=node, needs=needs, left=left)
                return False
        return True

    def _commit(self, intent: Intent, write: WriteShard, control: Control, waited: float | None) -> None:
        record = self._home.commit(intent, write, control)
        if control.rank == 0:
            self._tell(record, waited)
        rules = Rules.of(self._settings)
        removed = self._home.prune(rules, control)
        if removed and control.rank == 0:
            self._events.event("removed", steps=removed)
        self._publish(intent.step, control)
        removed = self._home.prune_store(rules, control)
        if removed and control.rank == 0:
            self._events.event("removed_from_store", steps=removed)

    def _publish(self, step: int, control: Control) -> None:
        published = self._home.publish(step, control)
        if published and control.rank == 0:
            self._events.event("published", step=step, bytes=published.bytes, seconds=round(published.seconds, 3))

    def _tell(self, record: CommitRecord, waited: float | None) -> None:
        """`waited`: seconds that the training stood still."""
        seconds = round(record.seconds, 3)
        stood = seconds if waited is None else round(waited, 3)
        self._events.event("commit", step=record.step, bytes=record.bytes, seconds=seconds, standstill_seconds=stood)

    @contextlib.contextmanager
    def _told(self, step: int) -> Iterator[None]:
        """What fails inside, on all workers alike, is told; it stops the run where `on_error` says so."""
        try:
            yield
        except CheckpointError as error:
            act, done = ("publish", "uploaded") if isinstance(error, NotPublished) else ("commit", "committed")
            if self._control.rank == 0:
                self._events.event(f"{act}_failed", step=step, message=str(error))
            if self._settings.on_error == "stop":
                raise
            log.warning("step %d was not %s: %s", step, done, error)


def _on_a_thread(work: Callable[[], None]) -> Future[None]:
    """`work` on a thread that dies with the process and leaves the processor to the training where both want it."""
    future: Future[None] = Future()

    def run() -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICE)
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - whoever settles raises it
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="saving", daemon=True).start()
    return future
