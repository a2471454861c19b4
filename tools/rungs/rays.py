"""Rung 3: the product as a user runs it, and a part of Ray killed under it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dstune.errors import DstuneError
from dstune.launch.driver import driver_lock
from dstune.launch.fence import kill_session
from dstune.launch.status import read_status
from dstune.paths import RunPaths
from tests.launch.ray_cluster import RayHead
from tests.launch.slurm_cluster import ticks
from tests.runs.tiny import dstune, metrics
from tests.spawn import read_lines
from tools.rungs.board import LONGER, Board, expect_exact
from tools.rungs.tally import Failed, Tally, expect

_RESUMED_SECONDS = 60.0
_WAIT_SECONDS = 180.0


def killed_raylet(tally: Tally, board: Board) -> None:
    """kill -9 of the raylet of an embedded Ray: the driver starts another by itself."""
    for seed in board.seeds:
        with tally.trial(seed, killed="raylet"):
            run, paths = _new(board)
            process = dstune("train", run, "--json")
            with _ended_after(process):
                _until(lambda paths=paths: _steps(paths) >= 4, process)
                _kill_raylet(process.pid)
                _expect_soon(tally, paths, process)
                _expect_succeeded(process, paths, board)


def killed_driver(tally: Tally, board: Board) -> None:
    """kill -9 of the driver alone: `dstune resume` goes on, and what it left behind disturbs nobody."""
    for seed in board.seeds:
        with tally.trial(seed, killed="driver"):
            run, paths = _new(board)
            process = dstune("train", run, "--json")
            with _ended_after(process):
                _until(lambda paths=paths: _steps(paths) >= 4, process)
                process.kill()
                process.communicate()
            process = dstune("resume", paths.root, "--json")
            with _ended_after(process):
                _expect_soon(tally, paths, process)
                _expect_succeeded(process, paths, board)


def killed_head(tally: Tally, board: Board) -> None:
    """A submitted run whose Ray head is killed with all that ran on it: submitted again to a new head, it goes on."""
    for seed in board.seeds[:1]:
        with tally.trial(seed, killed="head"):
            run, paths = _new(board)
            with RayHead(board.fresh("head")) as head:
                _said("submit", run, "--to", "ray", "--address", head.address)
                _until(lambda paths=paths: _steps(paths) >= 4, None)
                kill_session(head._process.pid)
            _until(
                lambda paths=paths: not _is_driven(paths), None
            )  # the job's own driver may outlive its head, even to the end
            if read_status(paths)["state"] == "succeeded":
                expect_exact(paths, board.long_reference)
                continue
            with RayHead(board.fresh("head")) as head:
                began = time.monotonic()
                _said("resume", paths.root, "--to", "ray", "--address", head.address)
                _expect_soon(tally, paths, None, began)
                _said("logs", paths.root, "--follow")
                status = _said("status", paths.root)
                expect(status["state"] == "succeeded", f"submitted again, the run ended as {status}")
            expect_exact(paths, board.long_reference)


def _new(board: Board) -> tuple[Path, RunPaths]:
    folder = board.fresh("ray")
    return board.write_run(folder, **LONGER), RunPaths(folder / "runs/tiny")


def _steps(paths: RunPaths) -> int:
    return len(read_lines(paths.metrics)) if paths.metrics.exists() else 0


def _is_driven(paths: RunPaths) -> bool:
    try:
        with driver_lock(paths):
            return False
    except DstuneError:
        return True


def _kill_raylet(driver: int) -> None:
    """SIGKILL the raylet of the Ray that the driver holds: it is in the session of a child of the driver's."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid=,sid=,comm="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in table.splitlines()]
    sessions = {pid for pid, parent, _, _ in rows if parent == str(driver)}
    found = [pid for pid, _, session, name in rows if session in sessions and name.strip() == "raylet"]
    expect(len(found) == 1, f"{len(found)} raylets in sessions {sessions}")
    os.kill(int(found[0]), signal.SIGKILL)


def _expect_soon(tally: Tally, paths: RunPaths, process: Any, began: float | None = None) -> None:
    """The second attempt takes a step within the minute, unless the first outlives what was killed and comes to its end."""
    began = time.monotonic() if began is None else began

    def goes_on() -> bool:
        return (_steps(paths) > 0 and 2 in metrics(paths, "attempt")) or (process is not None and process.poll() == 0)

    _until(goes_on, process)
    seconds = time.monotonic() - began
    tally.largest("longest_seconds_until_resumed", seconds)
    expect(seconds < _RESUMED_SECONDS, f"{seconds:.0f} s until the next attempt's first step")


def _until(condition: Callable[[], bool], process: Any) -> None:
    for _ in ticks(_WAIT_SECONDS, every=0.05):
        if condition():
            return
        expect(process is None or process.poll() is None, "the command ended early")
    raise Failed(f"nothing happened in {_WAIT_SECONDS:.0f} s")


def _expect_succeeded(process: Any, paths: RunPaths, board: Board) -> None:
    out, err = process.communicate(timeout=_WAIT_SECONDS)
    expect(process.returncode == 0, f"exit status {process.returncode}: {err[-2000:]}")
    expect(json.loads(out)["state"] == "succeeded", f"the run ended as {out}")
    expect_exact(paths, board.long_reference)


def _said(*words: str | Path) -> Any:
    """What a command answers with --json."""
    process = dstune(*words, "--json")
    out, err = process.communicate(timeout=_WAIT_SECONDS)
    expect(process.returncode == 0, f"dstune {words[0]}: exit status {process.returncode}: {err[-2000:]}")
    return json.loads(out)


class _ended_after:
    """Whatever happens, the command and all of its session are gone at the end."""

    def __init__(self, process: Any) -> None:
        self._process = process

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        kill_session(self._process.pid)
        self._process.wait()
