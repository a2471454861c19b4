"""What dstune promises of losses: exact after a kill, the same curve on any split of the batch, the same data on any world."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from dstune import api
from dstune.config.load import load_run
from dstune.data.shards import Prepared
from dstune.errors import CheckpointError, UsageError
from dstune.launch import adoption, control, rundir, start
from dstune.launch.driver import Observer
from dstune.paths import RunPaths
from tests.conftest import BUCKET
from tests.runs.tiny import assert_exact, drive, finished, metrics, weights_hash, write_run
from tests.spawn import read_lines

pytestmark = pytest.mark.dist


class KillOneWorker(Observer):
    """kill -9 of worker `rank` once `step` is seen, in the first attempt only."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step
        self.workers: list[dict[str, Any]] = []
        self.killed = False

    def on_event(self, record: dict[str, Any]) -> None:
        if record["event"] == "workers":
            self.workers = record["workers"]

    def on_step(self, record: dict[str, Any]) -> None:
        if record["step"] >= self.step and not self.killed:
            self.killed = True
            os.kill(self.workers[self.rank]["pid"], signal.SIGKILL)


class StopAt(Observer):
    """Ask for a stop once a step is seen."""

    def __init__(self, paths: RunPaths, step: int) -> None:
        self.paths, self.step = paths, step

    def on_step(self, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            control.request_stop(self.paths, control.USER)


@pytest.mark.parametrize(("rank", "step"), [(0, 4), (1, 8)])
def test_a_killed_worker_costs_at_most_an_interval_and_nothing_else(
    rank: int, step: int, reference: RunPaths, tmp_path: Path
) -> None:
    run = write_run(tmp_path)
    killer = KillOneWorker(rank, step)
    end = drive(run, 2, new=True, max_failures=3, observe=killer)
    assert killer.killed
    assert end.state == "succeeded", end
    paths = rundir.find(run)
    assert_exact(paths, reference)
    started = [r["from_step"] for r in read_lines(paths.events) if r["event"] == "attempt_started"]
    assert len(started) == 2
    # The step was seen when it was written, before its own commit: at most that interval is taken again.
    assert started[1] % 3 == 0
    assert started[1] > step - 2 * 3


def test_a_resume_is_exact_from_an_object_store_with_the_disk_lost_and_with_the_machine_lost(
    reference: RunPaths, s3: fs.S3FileSystem, tmp_path: Path
) -> None:
    run = write_run(tmp_path, checkpoint={"dir": f"s3://{BUCKET}/runs", "keep": 2})
    paths = adoption.create(load_run(run), api.prepare)
    end = drive(paths.root, 2, new=False, observe=StopAt(paths, 2))
    assert (end.state, end.exit_status) == ("stopped", 75)
    stopped_at = end.step
    assert stopped_at == len(read_lines(paths.metrics))
    with pytest.raises(UsageError, match="holds checkpoints of a run of this name already"):
        start.reached_store(load_run(run).config, new=True)
    shutil.rmtree(paths.checkpoints)
    (*_, listed) = api.checkpoints(paths.root, verify=True)["checkpoints"]
    assert listed["step"] == stopped_at and listed["verified"] and listed["directory"].startswith("s3://")
    assert api.verify_checkpoints(paths.root)["newest_whole"] == stopped_at
    assert drive(paths.root, 2, new=False, observe=StopAt(paths, 6)).state == "stopped"
    assert [record["step"] for record in read_lines(paths.events) if record["event"] == "fetched"] == [stopped_at]

    old = RunPaths(paths.root.rename(tmp_path / "old"))
    before = metrics(old, "loss")
    assert adoption.create(load_run(run), api.prepare) == paths
    with pytest.raises(CheckpointError, match="taken over"):
        drive(old.root, 2, new=False)
    assert drive(paths.root, 2, new=False).state == "succeeded"
    after = read_lines(paths.metrics)
    assert [record["step"] for record in after] == list(range(len(before) + 1, 13))
    assert before + [record["loss"] for record in after] == metrics(reference, "loss")
    assert weights_hash(paths, 12) == weights_hash(reference, 12)
    shown = api.checkpoints(paths.root)["checkpoints"]
    assert [one["step"] for one in shown] == [9, 9, 12, 12] and not any(one["problems"] for one in shown)
    # What the resume read went with its checkpoint; on a slow machine the stop came at step 9, which stays.
    assert set(json.loads(paths.verified.read_text())) <= {one["directory"] for one in shown}


def relative_difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other)
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 1e-3), ("fp32", 1e-4)])
def test_two_workers_then_one_then_two_read_the_same_data(dtype: str, limit: float, tmp_path: Path) -> None:
    long = {"train": {"max_steps": 100}, "model": {"dtype": dtype}, "checkpoint": {"every": 50}}
    whole = finished(write_run(tmp_path / "whole", **long))
    run = write_run(tmp_path / "cut", **long)
    paths = rundir.run_paths(load_run(run))
    assert drive(run, 2, new=True, observe=StopAt(paths, 30)).state == "stopped"
    assert drive(paths.root, 1, new=False, observe=StopAt(paths, 60)).state == "stopped"
    assert drive(paths.root, 2, new=False).state == "succeeded"
    assert metrics(paths, "batch_digest") == metrics(whole, "batch_digest")
    assert set(metrics(paths, "world")) == {1, 2}
    assert relative_difference(metrics(paths, "loss"), metrics(whole, "loss")) < limit


@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-4), ("bf16", 5e-3)])
def test_the_loss_curve_does_not_depend_on_the_split_of_the_batch(dtype: str, limit: float, tmp_path: Path) -> None:
    curves: dict[tuple[int, int], list[float]] = {}
    for workers, micro in [(1, 8), (1, 4), (2, 4), (2, 2)]:
        run = write_run(
            tmp_path / f"{workers}-{micro}",
            train={"global_batch_size": 8, "micro_batch_size": micro, "max_steps": 20},
            model={"dtype": dtype},
            checkpoint={"every": 1000},
        )
        curves[workers, micro] = metrics(finished(run, workers), "loss")
    for curve in curves.values():
        assert relative_difference(curve, curves[1, 8]) < limit


def test_each_row_comes_once_per_epoch_over_changing_worlds(tmp_path: Path) -> None:
    run = write_run(tmp_path, train={"max_steps": None, "epochs": 1}, data={"max_length": 256})
    paths = rundir.run_paths(load_run(run))
    drive(run, 2, new=True, observe=StopAt(paths, 4))
    assert drive(paths.root, 3, new=False).state == "succeeded"
    facts = rundir.environment(paths)["prepared"]
    prepared = Prepared.open(facts["directory"])
    assert sum(metrics(paths, "rows")) == prepared.num_rows
    assert sum(metrics(paths, "tokens")) == int(prepared.rows_tokens.sum())
    assert sum(metrics(paths, "supervised_tokens")) == int(prepared.rows_supervised.sum())
