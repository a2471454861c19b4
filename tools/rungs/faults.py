"""Faults at one chosen system call of a worker: SIGKILL before it, or an error in place of it. By strace; without it by patching `os`."""

import errno
import functools
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.protocols import Control
from tools.rungs.processes import Work, Workers
from tools.rungs.tally import Failed

WRITES = ("write", "pwrite64", "writev", "pwritev", "pwritev2", "fallocate", "ftruncate", "copy_file_range", "sendfile")
SYNCS = ("fsync", "fdatasync", "sync_file_range", "syncfs")
NAMES = ("mkdir", "mkdirat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "openat")
_PATCHED = (
    *("write", "pwrite", "writev", "pwritev", "ftruncate", "posix_fallocate", "fsync", "fdatasync"),
    *("open", "mkdir", "rename", "replace", "unlink", "rmdir"),
)
_STARTED = re.compile(r"(\d+)\s+(\w+)\((.*)")


@dataclass(frozen=True)
class Call:
    """The `nth` call (from 1) of its kind in its thread, and the file it was for."""

    kind: str
    nth: int
    where: str

    def __str__(self) -> str:
        return f"{self.kind} {self.nth} ({self.where})"


@dataclass(frozen=True)
class Seen:
    """What came of a world with a fault in it."""

    answers: list[dict[str, Any]]
    """As `Workers.join` gives them."""
    calls: list[Call]
    """What the watched worker did in the watched directory, the call with the fault last where it was killed."""


@functools.cache
def by() -> str:
    """By which means faults come on this machine."""
    if shutil.which("strace") is None:
        return "patched os functions (no strace here)"
    with tempfile.TemporaryDirectory() as folder:
        try:
            watched(lambda control: None, 0, Path(folder) / "nothing", means="strace")
        except Failed:
            return "patched os functions (strace may not attach here)"
    return "strace"


def watched(
    work: Work,
    rank: int,
    directory: Path,
    fault: Call | None = None,
    error: str = "",
    kill_all: bool = False,
    means: str | None = None,
) -> Seen:
    """Run `work` on two workers; `fault` comes in worker `rank`: the named error, or SIGKILL, with `kill_all` in both."""
    log = directory.with_name(f"{directory.name}.calls")
    log.unlink(missing_ok=True)
    if (means or by()) != "strace":
        with Workers(_patching(work, rank, directory, log, fault, error)) as workers:
            return Seen(_ended(workers, rank, kill_all), _patched_calls(log))
    with Workers(work) as workers:
        options = ["-e", f"trace={','.join('?' + kind for kind in WRITES + SYNCS + NAMES)}"]
        if fault is not None:
            options += ["-e", f"inject={fault.kind}:{f'error={error}' if error else 'signal=KILL'}:when={fault.nth}"]
        tracer = attach(workers.pids[rank], log, *options)
        answers = _ended(workers, rank, kill_all)
        _end(tracer)
    return Seen(answers, _traced_calls(log, directory))


def attach(pid: int, log: Path, *options: str) -> "subprocess.Popen[str]":
    """strace on a process and its threads to be. Raises Failed where that is not allowed."""
    command = ["strace", "-f", "-y", "-s", "300", "-o", str(log), "-p", str(pid), *options]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    line = tracer.stderr.readline()
    if "attached" not in line:
        _end(tracer)
        raise Failed(f"strace cannot attach: {line.strip()}")
    return tracer


def _end(tracer: "subprocess.Popen[str]") -> None:
    """Let it write down what it saw: it ends with the process that it looks at."""
    try:
        tracer.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        tracer.kill()
        tracer.communicate()


def _ended(workers: Workers, rank: int, kill_all: bool) -> list[dict[str, Any]]:
    workers.release()
    if kill_all and workers.died(rank):
        workers.kill()
    return workers.join()


def _traced_calls(log: Path, directory: Path) -> list[Call]:
    counts: Counter[tuple[str, str]] = Counter()
    calls: list[Call] = []
    for line in log.read_text(errors="replace").splitlines():
        if not (started := _STARTED.match(line)):
            continue  # the end of a call that another one interrupted, an exit
        thread, kind, arguments = started.groups()
        counts[thread, kind] += 1
        if f"{directory}/" in arguments and (kind != "openat" or "O_CREAT" in arguments):
            calls.append(Call(kind, counts[thread, kind], _below(arguments, directory)))
    return calls


def _below(arguments: str, directory: Path) -> str:
    """The first file below the directory that a call names; a save's temporary directory without its token."""
    name = arguments.partition(f"{directory}/")[2]
    return re.sub(r"\.tmp-\w+", ".tmp", re.split(r'[">,]', name)[0])


def _patching(work: Work, rank: int, directory: Path, log: Path, fault: Call | None, error: str) -> Work:
    """`work` with the functions of `os` that change files counted in worker `rank`, and the fault in one of them."""

    def faulty(control: Control) -> Any:
        if control.rank == rank:
            counts: Counter[str] = Counter()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            write = os.write
            for kind in _PATCHED:
                setattr(
                    os, kind, _counted(kind, vars(os)[kind], counts, fault, error, lambda line: write(output, line))
                )
        return work(control)

    return faulty


def _counted(
    kind: str,
    act: Callable[..., Any],
    counts: Counter[str],
    fault: Call | None,
    error: str,
    note: Callable[[bytes], object],
) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        counts[kind] += 1
        where = arguments[0] if isinstance(arguments[0], (str, os.PathLike)) else "a descriptor"
        note(f"{kind} {counts[kind]} {Path(where).name}\n".encode())
        if fault is not None and (kind, counts[kind]) == (fault.kind, fault.nth):
            if not error:
                os.kill(os.getpid(), signal.SIGKILL)
            number = vars(errno)[error]
            raise OSError(number, os.strerror(number), str(where))
        return act(*arguments, **named)

    return counted


def _patched_calls(log: Path) -> list[Call]:
    lines = [line.split(" ", 2) for line in log.read_text().splitlines()] if log.exists() else []
    return [Call(kind, int(nth), re.sub(r"\.tmp-\w+", ".tmp", where)) for kind, nth, where in lines]
