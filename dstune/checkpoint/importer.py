"""A commit by one process of what many workers of another trainer wrote: as many shards, each streamed by a thread of its own."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dstune.checkpoint import commit
from dstune.checkpoint.commit import CommitRecord
from dstune.protocols import Slice

_WRITERS = 2
"""Shards written at a time: enough to hash one while another waits for the disk."""


def commit_shards(
    checkpoints: Path,
    step: int,
    shards: Sequence[Callable[[], Iterable[Slice]]],
    state: Mapping[str, Any],
    fingerprints: Mapping[str, Any],
) -> CommitRecord:
    """Commit `step` with a shard of each of `shards`' slices. Slices may be views of mapped files: they are read as they are written.

    Raises CheckpointError where anything fails; nothing is left behind then.
    """
    meeting = _Meeting(len(shards))

    def one(rank: int) -> CommitRecord:
        control = _Thread(rank, meeting)
        return commit.save(checkpoints, step, control.in_turn(shards[rank]), state, control, fingerprints)

    with ThreadPoolExecutor(len(shards)) as pool:
        # Every thread raises the same agreed error: the first one's is everybody's.
        return next(iter(pool.map(one, range(len(shards)))))


class _Meeting:
    """Where the threads meet: a place for each one's word, and a few seats for those who write."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.words: list[Any] = [None] * size
        self.seats = threading.Semaphore(_WRITERS)


class _Thread:
    """`protocols.Control` of one thread among `meeting.size`."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.world_size = meeting.size
        self._meeting = meeting
        self._seated = False

    def in_turn(self, slices: Callable[[], Iterable[Slice]]) -> Iterable[Slice]:
        """The slices, once there is a seat; it is given up when this thread next speaks to the others."""
        self._meeting.seats.acquire()
        self._seated = True
        yield from slices()

    def barrier(self) -> None:
        self.gather(None)

    def gather(self, value: Any) -> list[Any]:
        if self._seated:
            self._meeting.seats.release()
            self._seated = False
        self._meeting.words[self.rank] = value
        self._meeting.barrier.wait()
        words = list(self._meeting.words)
        self._meeting.barrier.wait()
        return words

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]
