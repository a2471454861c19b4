"""status.json: where a run stands, written whole by its driver and read by anybody."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

from dstune.atomic import write_json
from dstune.errors import DstuneError, Problem, UsageError, first_line
from dstune.paths import RunPaths

ACTIVE = ("queued", "running")
FINAL = ("succeeded", "failed", "stopped", "preempted")

_LEAST_SECONDS_BETWEEN_WRITES = 1.0


class StatusFile:
    """Keeps status.json; changes of state are written at once, progress at most once a second."""

    def __init__(self, paths: RunPaths) -> None:
        self._path = paths.status
        self._value: dict[str, Any] = {"state": "planned", "step": 0, "committed_step": 0, "world": 0, "attempt": 0}
        self._written = 0.0

    @property
    def step(self) -> int:
        return int(self._value["step"])

    def adopt(self, value: dict[str, Any]) -> None:
        """Go on from what an earlier writer left."""
        self._value |= value

    def progress(self, **facts: Any) -> None:
        """Note facts that may wait a moment before they reach the disk."""
        self._value |= facts
        if time.monotonic() - self._written >= _LEAST_SECONDS_BETWEEN_WRITES:
            self.write()

    def write(self, **facts: Any) -> None:
        """Note facts and write them now."""
        self._value |= facts
        here = {"host": socket.gethostname(), "pid": os.getpid(), "time": round(time.time(), 3)}
        write_json(self._path, self._value | here)
        self._written = time.monotonic()


def read_status(paths: RunPaths) -> dict[str, Any]:
    """status.json as it stands. Raises UsageError where the run directory has none."""
    try:
        value = json.loads(paths.status.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{paths.root}: no run here (it has no {paths.status.name})") from None
    except ValueError:
        value = None
    if not isinstance(value, dict) or not isinstance(value.get("state"), str):
        raise UsageError(Problem(str(paths.status), "is damaged", do="`dstune resume` writes it anew"))
    return value


@contextlib.contextmanager
def told(paths: RunPaths, waiting: Sequence[str] = ("planned",)) -> Iterator[None]:
    """Has status.json say what kept a run that was `waiting` from being driven: its driver was not there yet to write it."""
    try:
        yield
    except DstuneError as error:
        with contextlib.suppress(UsageError):
            before = read_status(paths)
            if before["state"] in waiting and not driver_lives(paths):
                status = StatusFile(paths)
                status.adopt(before)
                reason = f"not started: {first_line(error)}; `dstune resume {paths.root}` tries again"
                status.write(state="failed", reason=reason, message=str(error), exit_status=error.exit_status)
        raise


def driver_lives(paths: RunPaths) -> bool:
    """True while a driver holds the run's lock (on this machine, or on a file system that carries locks)."""
    if not paths.lock.exists():
        return False
    with paths.lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False
