"""No two generations of workers at once: what an attempt left behind is gone before the next one touches the run directory.

A Ray that was killed leaves its workers running for some seconds more, a stopped process for ever; either could still write a step
or commit a checkpoint. So every worker holds a lock on a file of the run for as long as it lives, which the kernel takes back
whatever ends it, and the driver waits until nobody holds it.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dstune.errors import Problem, RunFailed
from dstune.paths import RunPaths

_LOOK_SECONDS = 0.2
_SESSION_ROUNDS = 20
_held: list[Any] = []


def hold(paths: RunPaths) -> None:
    """Called by a worker: hold the run's lock until this process is gone."""
    file = paths.workers_lock.open("a+b")
    fcntl.flock(file, fcntl.LOCK_SH)
    _held.append(file)


def clear(paths: RunPaths, attempt: int, seconds: float = 90.0) -> None:
    """Kill what is left on this machine of `attempt`'s workers, and wait for those elsewhere to go.

    Raises RunFailed where a worker still lives after `seconds`.
    """
    _kill_seated(paths, attempt)
    end, pause = time.monotonic() + seconds, threading.Event()
    with paths.workers_lock.open("a+b") as file:
        while not _lock(file):
            if time.monotonic() > end:
                came = f"workers of attempt {attempt} still live after {seconds:.0f} s"
                do = f"{paths.workers(attempt)} says where: end them, then `dstune resume`"
                raise RunFailed(Problem(str(paths.root), came, do=do))
            pause.wait(_LOOK_SECONDS)


@contextlib.contextmanager
def empty(paths: RunPaths) -> Iterator[bool]:
    """Whether no worker lives; where so, a new one waits at its beginning until the block ends."""
    with paths.workers_lock.open("a+b") as file:
        yield _lock(file)


def started(pid: int) -> int | None:
    """When a process of this machine started (clock ticks since boot): with its number, which one it is. None: there is none."""
    fields = _stat(pid)
    return None if fields is None or fields[0] == "Z" else int(fields[19])


def kill_session(session: int, but: int | None = None) -> None:
    """SIGKILL every process of a session on this machine (all that a session's leader started, however deep), save `but`."""
    for _ in range(_SESSION_ROUNDS):  # a process may start another between two looks
        members = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if _in_session(int(entry.name), session)]
        if not (living := [pid for pid in members if pid != but]):
            return
        for pid in living:
            _kill(pid)


def _in_session(pid: int, session: int) -> bool:
    fields = _stat(pid)
    return fields is not None and int(fields[3]) == session and fields[0] != "Z"


def _kill_seated(paths: RunPaths, attempt: int) -> None:
    try:
        seats = json.loads(paths.workers(attempt).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return
    for seat in seats:
        if seat["node"] == socket.gethostname() and started(seat["pid"]) == seat["started"]:
            _kill(seat["pid"])


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _lock(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on: 0 state, 3 session, 19 start time."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
