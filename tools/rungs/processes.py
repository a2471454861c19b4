"""Workers without a training: forked processes that agree over sockets, held at their start, each of which may be killed."""

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dstune.protocols import Control

T = TypeVar("T")
Work = Callable[[Control], Any]
"""What each worker does; its result must be JSON-like."""

_FORK = multiprocessing.get_context("fork")
OUT_SECONDS = 30.0
"""So long may workers take to leave once one of them has failed."""


class SocketControl:
    """`protocols.Control` over one socket to worker 0 (worker 0: one to each other). Where a worker is gone the others raise."""

    def __init__(self, rank: int, world_size: int, peers: Sequence[socket.socket]) -> None:
        self.rank, self.world_size = rank, world_size
        self._peers = peers
        self._readers = [peer.makefile("r", encoding="utf-8") for peer in peers]

    def barrier(self) -> None:
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        if self.rank != 0:
            self._send(0, value)
            return self._hear(0)
        values = [json.loads(json.dumps(value))] + [self._hear(peer) for peer in range(len(self._peers))]
        return self.broadcast(values)

    def broadcast(self, value: T) -> T:
        if self.rank != 0:
            return self._hear(0)
        for peer in range(len(self._peers)):
            self._send(peer, value)
        return json.loads(json.dumps(value))

    def _send(self, peer: int, value: object) -> None:
        try:
            self._peers[peer].sendall((json.dumps(value) + "\n").encode())
        except OSError as error:
            raise RuntimeError("Connection closed by peer") from error

    def _hear(self, peer: int) -> Any:
        line = self._readers[peer].readline()
        if not line.endswith("\n"):
            raise RuntimeError("Connection closed by peer")
        return json.loads(line)


class Workers:
    """One forked process a rank, waiting for `release`. Use it in a `with`: at its end nobody lives."""

    def __init__(self, work: Work, world_size: int = 2, log: Path | None = None) -> None:
        star = [socket.socketpair() for _ in range(1, world_size)]
        self._lines = [socket.socketpair() for _ in range(world_size)]
        sockets = [end for pair in star + self._lines for end in pair]
        self._processes = []
        for rank in range(world_size):
            mine = [pair[0] for pair in star] if rank == 0 else [star[rank - 1][1]]
            line = self._lines[rank][1]
            others = [end for end in sockets if end not in (*mine, line)]
            control = (rank, world_size, mine)
            self._processes.append(_FORK.Process(target=_worker, args=(work, control, line, others, log), daemon=True))
        for process in self._processes:
            process.start()
        for end in [end for pair in star for end in pair] + [pair[1] for pair in self._lines]:
            end.close()
        self._readers = [pair[0].makefile("r", encoding="utf-8") for pair in self._lines]
        for reader in (
            self._readers
        ):  # until each is held: what a worker calls on its way there is not looked at, and gets no fault
            reader.readline()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for reader, pair in zip(self._readers, self._lines, strict=True):
            reader.close()
            pair[0].close()

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def release(self) -> None:
        """Let them begin."""
        for pair in self._lines:
            pair[0].sendall(b"go\n")

    def hear(self, rank: int) -> Any:
        """The next thing a worker says; None once it is gone."""
        line = self._readers[rank].readline()
        return json.loads(line) if line.endswith("\n") else None

    def joined(self, rank: int, seconds: float) -> bool:
        """Wait so long for one worker's end; whether it came."""
        self._processes[rank].join(seconds)
        return self._processes[rank].exitcode is not None

    def died(self, rank: int) -> bool:
        """Wait for one worker's end; whether it was none of its own will."""
        return self.joined(rank, OUT_SECONDS) and self._processes[rank].exitcode != 0

    def kill(self, *ranks: int) -> None:
        """SIGKILL to some, or to all."""
        for rank in ranks or range(len(self._processes)):
            self._processes[rank].kill()
        for rank in ranks or range(len(self._processes)):
            self._processes[rank].join()

    def join(self, seconds: float = OUT_SECONDS) -> list[dict[str, Any]]:
        """How each ended: {"value"} or {"error", "message"} by its own word, {"killed": signal}, or {"hung": True}."""
        end = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        return [self._answer(rank) for rank in range(len(self._processes))]

    def _answer(self, rank: int) -> dict[str, Any]:
        code = self._processes[rank].exitcode
        if code is None:
            return {"hung": True}
        return {"killed": -code} if code else self.hear(rank)


def _worker(
    work: Work,
    control: tuple[int, int, list[socket.socket]],
    line: socket.socket,
    others: list[socket.socket],
    log: Path | None,
) -> None:
    for end in others:  # or nobody would hear that a worker is gone
        end.close()
    output = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    line.sendall(b"held\n")
    if not line.recv(8):
        os._exit(0)  # released by nobody: the rung is over
    try:
        answer: dict[str, Any] = {"value": work(SocketControl(*control))}
    except Exception as error:  # noqa: BLE001 - told to the rung
        answer = {"error": type(error).__name__, "message": str(error)}
    line.sendall((json.dumps(answer) + "\n").encode())
    os._exit(0)


def done(work: Work, world_size: int = 2) -> list[Any]:
    """Call `work` on every rank of a fresh world; results by rank. Raises RuntimeError where one did not end well."""
    with Workers(work, world_size) as workers:
        workers.release()
        answers = workers.join()
    if wrong := [answer for answer in answers if "value" not in answer]:
        raise RuntimeError(f"workers ended with {wrong}")
    return [answer["value"] for answer in answers]
