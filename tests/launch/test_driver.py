"""The driver over plain processes: attempts, failures, stops, records cut back, one driver a run."""

import json
import os
import signal
import sys
import threading

import pytest

from dstune.checkpoint import resolve
from dstune.errors import CheckpointError, DataError, UsageError
from dstune.launch import control
from dstune.launch.driver import DriveLimits, Observer, drive, driver_lock
from dstune.launch.fence import started
from dstune.launch.status import driver_lives, read_status
from dstune.paths import RunPaths, step_directory
from tests.launch.process_executor import ProcessExecutor, events, hurry, lines, planner, steps, stub_run
from tests.spawn import start_worker

LIMITS = DriveLimits(workers_wanted=2, workers_min=1, max_failures=2, settle_seconds=0.5, wait_seconds=2)


class Recorder(Observer):
    def __init__(self):
        self.steps, self.commits, self.kinds = [], [], []

    def on_step(self, record):
        self.steps.append(record["step"])

    def on_commit(self, record):
        self.commits.append(record["step"])

    def on_event(self, record):
        self.kinds.append(record["event"])


def go(paths, executor=None, limits=LIMITS, observe=None, **options):
    executor = executor or ProcessExecutor()
    return drive(paths, executor, planner(paths), limits, observe, handle_signals=False, **options)


def test_a_run_to_its_end(tmp_path):
    paths, seen = stub_run(tmp_path), Recorder()
    end = go(paths, observe=seen)
    assert (end.state, end.step, end.exit_status) == ("succeeded", 20, 0)
    assert steps(paths) == seen.steps == list(range(1, 21))
    assert seen.commits == [5, 10, 15, 20] and seen.kinds[0] == "attempt_started" and seen.kinds[-1] == "drive_ended"
    status = read_status(paths)
    assert status["state"] == "succeeded" and status["step"] == 20 and status["world"] == 2 and status["attempt"] == 1
    assert not driver_lives(paths)


def test_a_killed_worker_is_named_and_each_step_stands_once(tmp_path):
    paths = stub_run(tmp_path, die={"rank": 0, "step": 13, "attempts": [1]})
    end = go(paths)
    assert (end.state, end.exit_status) == ("succeeded", 0)
    assert steps(paths) == list(range(1, 21))
    assert {record["step"]: record["attempt"] for record in lines(paths.metrics)}[10] == 1
    assert {record["step"]: record["attempt"] for record in lines(paths.metrics)}[11] == 2
    failure = events(paths, "failure")[0]
    assert failure["rank"] == 0 and "signal 9" in failure["message"]
    assert [e["from_step"] for e in events(paths, "attempt_started")] == [0, 10]


def test_the_first_error_that_is_not_collateral_is_the_message(tmp_path):
    paths = stub_run(tmp_path, fail={"rank": 1, "step": 7, "kind": "ValueError", "attempts": [1, 2, 3]})
    end = go(paths)
    assert (end.state, end.exit_status, end.step) == ("failed", 1, 5)
    assert "worker 1 on node" in end.message and "ValueError: bad luck" in end.message
    assert str(paths.rank_error(1)) in end.message and "bad luck" in paths.rank_error(1).read_text()
    assert len(events(paths, "failure")) == 3 and read_status(paths)["state"] == "failed"


def test_a_commit_in_between_starts_the_count_again(tmp_path):
    mishap = {"rank": 0, "step": 13, "attempts": [1, 3]}
    paths = stub_run(tmp_path, steps=30, die=mishap, fail={"rank": 0, "step": 8, "kind": "ValueError", "attempts": [2]})
    end = go(paths, limits=DriveLimits(1, 1, max_failures=1))
    assert end.state == "succeeded"


def test_an_error_of_the_data_is_not_tried_again(tmp_path):
    paths = stub_run(tmp_path, fail={"rank": 0, "step": 3, "kind": "DataError", "attempts": [1]})
    end = go(paths)
    assert (end.state, end.exit_status) == ("failed", 3) and len(events(paths, "attempt_started")) == 1


def test_a_stop_commits_and_a_second_drive_goes_on(tmp_path):
    paths = stub_run(tmp_path, steps=60, seconds=0.05, commit_every=1000)

    class StopAtSeven(Observer):
        def on_step(self, record):
            if record["step"] == 7:
                control.request_stop(paths, control.USER)

    end = go(paths, observe=StopAtSeven())
    assert (end.state, end.exit_status) == ("stopped", 75) and 7 <= end.step < 60
    assert step_directory(paths.checkpoints, end.step).exists() and control.stop_requested(paths) is None
    assert read_status(paths)["step"] == end.step
    assert go(paths).state == "succeeded"
    assert steps(paths) == list(range(1, 61))


def test_a_users_stop_holds_for_the_next_drive_but_a_signals_does_not(tmp_path):
    paths = stub_run(tmp_path)
    control.request_stop(paths, control.USER)
    executor = ProcessExecutor()
    assert go(paths, executor).state == "stopped" and executor.worlds == []
    control.request_stop(paths, "preempted")
    assert go(paths).state == "succeeded"


def test_fewer_workers_then_room_again(tmp_path):
    paths = stub_run(tmp_path, steps=400, commit_every=50, seconds=0.02)
    executor = ProcessExecutor(room=1)

    class Room(Observer):
        def on_step(self, record):
            executor.room = 2

        def on_event(self, record):
            if record["event"] == "stop_requested":
                hurry(paths)

    limits = DriveLimits(workers_wanted=2, workers_min=1, settle_seconds=0.1, grow_seconds=0.4)
    assert go(paths, executor, limits, Room()).state == "succeeded"
    assert executor.worlds == [1, 2] and steps(paths) == list(range(1, 401))
    assert events(paths, "resize")[0]["world"] == 2


def test_no_room_is_no_fit(tmp_path):
    end = go(stub_run(tmp_path), ProcessExecutor(room=0), DriveLimits(2, 2, wait_seconds=0.1))
    assert (end.state, end.exit_status) == ("failed", 4) and "0 of 2" in end.message


def test_only_one_driver_a_run(tmp_path):
    paths = stub_run(tmp_path)
    with driver_lock(paths):
        assert driver_lives(paths)
        with pytest.raises(UsageError, match="driven by another process"):
            go(paths)


def test_damaged_commits_are_passed_over_and_named(tmp_path):
    paths = stub_run(tmp_path, die={"rank": 0, "step": 12, "attempts": [1]})
    assert go(paths, limits=DriveLimits(1, 1, max_failures=0)).state == "failed"
    shard = next(step_directory(paths.checkpoints, 10).glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    assert go(paths).state == "succeeded"
    assert events(paths, "attempt_started")[-1]["from_step"] == 5
    assert "step-00000010" in events(paths, "passed_over")[0]["checkpoint"]
    assert steps(paths) == list(range(1, 21))


def test_what_workers_find_damaged_is_passed_over_and_is_no_failure_of_theirs(tmp_path):
    paths = stub_run(tmp_path, checks=True, die={"rank": 0, "step": 12, "attempts": [1]})
    limits = DriveLimits(1, 1, max_failures=0)
    assert go(paths, limits=limits).state == "failed"
    shard = next(step_directory(paths.checkpoints, 10).glob("shard-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"\x00")
    assert go(paths, limits=limits, workers_check=True).state == "succeeded"
    assert [event["from_step"] for event in events(paths, "attempt_started")] == [0, 10, 5]
    assert events(paths, "failure")[-1]["error"] == "DamagedCheckpoint"
    assert "step-00000010" in events(paths, "passed_over")[0]["checkpoint"]
    assert shard.name in events(paths, "passed_over")[0]["checkpoint"]
    assert steps(paths) == list(range(1, 21))


def test_damage_that_only_the_workers_see_is_a_failure_in_the_end(tmp_path, monkeypatch):
    paths = stub_run(tmp_path, checks=True, die={"rank": 0, "step": 12, "attempts": [1]})
    limits = DriveLimits(1, 1, max_failures=0)
    assert go(paths, limits=limits).state == "failed"
    shard = next(step_directory(paths.checkpoints, 10).glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    monkeypatch.setattr(resolve, "verify", lambda checkpoint, blocks: [])
    end = go(paths, limits=limits, workers_check=True)
    assert end.state == "failed" and "is damaged" in end.message and len(events(paths, "attempt_started")) == 3


def test_a_run_that_committed_never_starts_from_nothing(tmp_path):
    paths = stub_run(tmp_path, die={"rank": 0, "step": 12, "attempts": [1]})
    assert go(paths, limits=DriveLimits(1, 1, max_failures=0)).state == "failed"
    for step in (5, 10):
        (step_directory(paths.checkpoints, step) / "manifest.json").unlink()
    before = steps(paths)
    with pytest.raises(CheckpointError, match=r"step-00000010.*\n.*step-00000005"):
        go(paths)
    assert steps(paths) == before and read_status(paths)["state"] == "failed"


def test_a_planners_error_ends_the_drive_with_its_status(tmp_path):
    paths = stub_run(tmp_path)

    def refuse(*_):
        raise DataError("no rows")

    with pytest.raises(DataError):
        drive(paths, ProcessExecutor(), refuse, LIMITS, handle_signals=False)
    assert read_status(paths)["state"] == "failed" and read_status(paths)["exit_status"] == 3


def _drive(root):
    paths = RunPaths(root)
    end = drive(paths, ProcessExecutor(), planner(paths), DriveLimits(1, 1))
    print(end.state, end.step, flush=True)
    sys.exit(end.exit_status)


def driver_process(paths, begun):
    """A driver in a process of its own, which says how it ended in `said`; back when `begun()` holds."""
    process = start_worker(_drive, paths.root, environment=os.environ, log=paths.root / "said")
    pause = threading.Event()
    while not begun():
        assert process.exitcode is None, (paths.root / "said").read_text()
        pause.wait(0.05)
    return process


def some_steps(paths):
    return lambda: paths.metrics.exists() and len(paths.metrics.read_text().splitlines()) > 3


@pytest.mark.parametrize(
    ("number", "state"),
    [(signal.SIGINT, "stopped"), (signal.SIGTERM, "stopped"), (signal.SIGUSR1, "preempted")],
)
def test_signals_save_first(tmp_path, number, state):
    paths = stub_run(tmp_path, steps=10_000, commit_every=10_000, seconds=0.05)
    process = driver_process(paths, some_steps(paths))
    os.kill(process.pid, number)
    process.join(60)
    said = (tmp_path / "said").read_text().split()
    assert process.exitcode == 75 and said[0] == state
    assert step_directory(paths.checkpoints, int(said[1])).exists()
    assert read_status(paths)["state"] == state


def test_a_second_interrupt_kills(tmp_path):
    paths = stub_run(tmp_path, steps=10_000, commit_every=10_000, seconds=20)
    process = driver_process(paths, paths.workers(1).exists)
    os.kill(process.pid, signal.SIGINT)
    pause = threading.Event()
    while control.stop_requested(paths) is None:
        pause.wait(0.05)
    os.kill(process.pid, signal.SIGINT)
    process.join(15)
    assert process.exitcode == 75


def test_a_killed_driver_leaves_the_run_free_to_go_on(tmp_path):
    paths = stub_run(tmp_path, steps=40, seconds=0.05)
    process = driver_process(paths, some_steps(paths))
    worker = json.loads(paths.workers(1).read_text())[0]
    process.kill()
    process.join()
    os.kill(worker["pid"], signal.SIGSTOP)  # the next driver must not start beside what the killed one left
    assert read_status(paths)["state"] == "running" and not driver_lives(paths)
    assert go(paths).state == "succeeded"
    assert started(worker["pid"]) is None
    assert steps(paths) == list(range(1, 41))
