"""Rungs 1, 2 and 4 to 6 on whole runs: two gloo workers train a tiny model, are stopped, killed, starved of space."""

import functools
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dstune.checkpoint.resolve import newest_whole
from dstune.launch import control, rundir
from dstune.launch.driver import Observer
from dstune.paths import RunPaths, step_directory
from tests.runs.tiny import drive, metrics, state_hash, weights_hash
from tests.spawn import read_lines
from tools.rungs import faults
from tools.rungs.board import EVERY, Board, expect_column, expect_exact
from tools.rungs.commits import mounted, remount
from tools.rungs.processes import OUT_SECONDS
from tools.rungs.tally import Tally, expect


def begun(run: Path) -> RunPaths:
    """Where a run that is not started yet will be."""
    return rundir.run_paths(rundir.load_run(run))


# --- 1: stopped at every step --------------------------------------------------------------------------------------


class _StopSoon(Observer):
    """Ask for a stop as soon as the workers are there: they take one step."""

    def __init__(self, paths: RunPaths) -> None:
        self.paths = paths

    def on_event(self, record: dict[str, Any]) -> None:
        if record["event"] == "workers":
            control.request_stop(self.paths, control.USER)


def stopped_at_every_step(tally: Tally, board: Board) -> None:
    """One run, stopped and resumed at each of its steps (as many as `points`): the weights at each stop, and in the end all, are exact."""
    run = board.write_run(board.fresh("stops"))
    paths = begun(run)
    target, state, stops = board.points or 12, "stopped", 0
    while state == "stopped" and stops < target:
        with tally.trial(0, stop=stops + 1):
            end = drive(run if not stops else paths.root, 2, new=not stops, observe=_StopSoon(paths))
            stops, state = stops + 1, end.state
            expect(end.state in ("stopped", "succeeded"), f"the run ended as {end}")
            expect(end.step == stops, f"it was to take one step, and stopped at {end.step} after stop {stops}")
            same = weights_hash(paths, end.step) == weights_hash(board.reference, end.step)
            expect(same, f"other weights after step {end.step}")
    with tally.trial(0, whole_run=True):
        if state == "stopped":
            drive(paths.root, 2, new=False)
        expect_exact(paths, board.reference)


# --- 2: killed at random moments -----------------------------------------------------------------------------------


class _Disturb(Observer):
    """Do something to the workers some time after a step was seen (0: after they started), in the first attempt only."""

    def __init__(self, step: int, delay: float, act: Callable[[list[int]], None]) -> None:
        self.step, self.delay, self.act = step, delay, act
        self.begun = False
        self.pids: list[int] = []

    def on_event(self, record: dict[str, Any]) -> None:
        if record["event"] == "workers" and not self.pids:
            self.pids = [seat["pid"] for seat in record["workers"]]
            self._look(0)

    def on_step(self, record: dict[str, Any]) -> None:
        self._look(record["step"])

    def _look(self, step: int) -> None:
        if step >= self.step and not self.begun:
            self.begun = True
            threading.Timer(self.delay, self.act, [self.pids]).start()


class _KillOne(_Disturb):
    """kill -9 of one worker; counts the steps that had been taken when the attempt had failed of it."""

    def __init__(self, paths: RunPaths, draw: random.Random) -> None:
        super().__init__(draw.randrange(12), draw.random() * 1.5, self._kill)
        self.paths, self.rank = paths, draw.randrange(2)
        self.steps = 0

    def _kill(self, pids: list[int]) -> None:
        try:
            os.kill(pids[self.rank], signal.SIGKILL)
        except ProcessLookupError:
            return  # it was done before: a moment too late is a moment too

    def on_event(self, record: dict[str, Any]) -> None:
        super().on_event(record)
        if record["event"] == "failure":
            self.steps = len(read_lines(self.paths.metrics)) if self.paths.metrics.exists() else 0


def killed_at_random_moments(tally: Tally, board: Board) -> None:
    """kill -9 of a random worker at a random moment: exact; at most one interval is lost, counted back from the save in flight."""
    for seed in board.seeds:
        with tally.trial(seed):
            run = board.write_run(board.fresh("kill"))
            paths = begun(run)
            killer = _KillOne(paths, random.Random(seed))
            end = drive(run, 2, new=True, max_failures=3, observe=killer)
            expect(end.state == "succeeded", f"the run ended as {end}")
            expect_exact(paths, board.reference)
            starts = _starts(paths)
            tally.count("killed", len(starts) - 1)
            if len(starts) > 1:
                tally.largest("most_steps_lost", killer.steps - starts[1])
                due = killer.steps - killer.steps % EVERY  # in flight perhaps; the one before it is committed
                expect(starts[1] >= due - EVERY, f"killed behind step {killer.steps}, it went on from {starts[1]}")


_STANDS_SECONDS = 1.5
"""A save that is there for so long is the one that was delayed, not one that was under way when strace came."""

# --- 4: a late worker ----------------------------------------------------------------------------------------------


class _AtCommit(_Disturb):
    """Disturb them after the first commit from a step on."""

    def on_step(self, record: dict[str, Any]) -> None:
        """A step is no commit."""

    def on_commit(self, record: dict[str, Any]) -> None:
        self._look(record["step"])


def a_late_worker_in_a_run(tally: Tally, board: Board) -> None:
    """One worker's fsync delayed by strace, then all killed in that save: the previous checkpoint is taken, and the run is exact."""
    if faults.by() != "strace":
        tally.facts["whole_run"] = "left out: it wants strace"
        return
    for seed in board.seeds:
        with tally.trial(seed, run=True):
            run = board.write_run(board.fresh("late"))
            paths = begun(run)
            rank, caught = random.Random(seed).randrange(2), list[int]()
            disturb = _AtCommit(EVERY, 0.0, functools.partial(_delay_and_kill, paths, rank, caught))
            end = drive(run, 2, new=True, max_failures=1, observe=disturb)
            expect(end.state == "succeeded", f"the run ended as {end}")
            expect(caught and caught[0], "no save was seen")
            starts = _starts(paths)
            expect(len(starts) == 2 and starts[1] == caught[0] - EVERY, f"killed in save {caught}, started at {starts}")
            expect_exact(paths, board.reference)


def _delay_and_kill(paths: RunPaths, rank: int, caught: list[int], pids: list[int]) -> None:
    option = "inject=fsync,fdatasync:delay_enter=60000000"
    tracer = faults.attach(pids[rank], paths.root / "calls", "-e", "trace=fsync,fdatasync", "-e", option)
    caught.append(_step_in_save(paths, 1 - rank))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    tracer.kill()  # or it would hold the dead until the delay is over
    tracer.communicate()


def _starts(paths: RunPaths) -> list[int]:
    """The step from which each attempt went on."""
    return [event["from_step"] for event in read_lines(paths.events) if event["event"] == "attempt_started"]


def _step_in_save(paths: RunPaths, rank: int) -> int:
    """Wait until that worker's shard of an unfinished save is there, and stays; its step, 0 where none came."""
    pause = threading.Event()
    for _ in range(3000):
        for shard in paths.checkpoints.glob(f"step-*.tmp-*/shard-{rank:05d}-of-*"):
            pause.wait(_STANDS_SECONDS)
            if shard.exists():
                return int(shard.parent.name[5:13])
        pause.wait(0.01)
    return 0


# --- 5: killed in a save -------------------------------------------------------------------------------------------

_POINTS = {
    0: (*(("fsync", nth) for nth in range(1, 6)), ("pwrite64", 1), ("ftruncate", 1), ("mkdir", 1), ("rename", 1)),
    1: (("pwrite64", 1), ("ftruncate", 1), ("fsync", 1)),
}
"""What each worker does in a save, on a thread that is new in every save."""


def killed_in_a_save(tally: Tally, board: Board) -> None:
    """SIGKILL by strace at a random call of a save behind the training, in either worker: the run goes on, never from step 0, exactly."""
    if faults.by() != "strace":
        tally.facts["whole_run"] = "left out: it wants strace"
        return
    for seed in board.seeds:
        draw = random.Random(seed)
        rank = draw.randrange(2)
        kind, nth = draw.choice(_POINTS[rank])
        with tally.trial(seed, run=True, worker=rank, killed_at=f"{kind} {nth}"):
            run = board.write_run(board.fresh("save"))
            paths = begun(run)
            disturb = _AtCommit(EVERY, 0.0, functools.partial(_kill_at, paths, rank, kind, nth))
            end = drive(run, 2, new=True, max_failures=1, observe=disturb)
            expect(end.state == "succeeded", f"the run ended as {end}")
            starts = _starts(paths)
            expect(all(step >= EVERY for step in starts[1:]), f"committed at {EVERY}, started again at {starts[1:]}")
            tally.count("runs_killed", len(starts) - 1)
            expect_exact(paths, board.reference)


def _kill_at(paths: RunPaths, rank: int, kind: str, nth: int, pids: list[int]) -> None:
    option = f"inject={kind}:signal=KILL:when={nth}"
    faults.attach(pids[rank], paths.root / "calls", "-e", f"trace={kind}", "-e", option).communicate()


# --- 6: a full disk ------------------------------------------------------------------------------------------------


def full_disk_in_a_run(tally: Tally, board: Board) -> None:
    """Checkpoints on a tmpfs that fills up: the run ends in time with the reason, and goes on once there is room, exactly."""
    size = sum(path.stat().st_size for path in step_directory(board.reference.checkpoints, 12).iterdir())
    for seed in board.seeds[:1]:
        disk = board.fresh("disk")
        with mounted(disk, round(2.5 * size)) as may_mount:
            if not may_mount:
                tally.facts["whole_run"] = "left out: mounting is not allowed here"
                return
            with tally.trial(seed, run=True):
                run = board.write_run(board.fresh("full"), checkpoint={"dir": str(disk)})
                paths = begun(run)
                end = drive(run, 2, new=True)
                expect(end.state == "failed" and "No space left on device" in end.message, f"the run ended as {end}")
                events = {event["event"]: event for event in read_lines(paths.events)}
                seconds = events["attempt_ended"]["time"] - events["commit_failed"]["time"]
                tally.largest("seconds_until_all_are_out", seconds)
                expect(seconds < OUT_SECONDS, f"the workers took {seconds:.0f} s to leave")
                found, passed_over = newest_whole(disk / "tiny")
                expect(found and found.step == events["commit"]["step"], f"{found} is left: {passed_over}")
                remount(disk, 20 * size)
                end = drive(paths.root, 2, new=False)
                expect(end.state == "succeeded", f"with room again, the run ended as {end}")
                for name in ("loss", "batch_digest"):
                    expect_column(name, metrics(paths, name), metrics(board.reference, name))
                same = state_hash(step_directory(disk / "tiny", 12), "fp32") == weights_hash(board.reference, 12)
                expect(same, "other weights in the end")
