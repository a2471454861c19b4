"""The product as a user runs it: `dstune train` on an embedded Ray, killed, stopped, resumed, exported."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dstune.launch import rundir
from dstune.paths import RunPaths
from tests.runs.tiny import assert_exact, dstune, metrics, write_run
from tests.spawn import read_lines

pytestmark = pytest.mark.ray


def wait_for(condition: Callable[[], bool], process: object, seconds: float = 180) -> None:
    """Look until `condition` holds; the process must live as long."""
    pause, end = threading.Event(), time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()  # type: ignore[attr-defined]
        assert time.monotonic() < end, "nothing happened"
        pause.wait(0.05)


def steps_done(paths: RunPaths) -> int:
    return len(read_lines(paths.metrics)) if paths.metrics.exists() else 0


def workers_of(paths: RunPaths) -> list[list[int]]:
    """The workers' process ids, attempt by attempt."""
    return [[w["pid"] for w in r["workers"]] for r in read_lines(paths.events) if r["event"] == "workers"]


def test_a_worker_killed_is_replaced_and_everything_killed_is_resumed_by_hand_and_exact(
    reference: RunPaths, tmp_path: Path
) -> None:
    run = write_run(tmp_path)
    process = dstune("train", run, "--json")
    paths = RunPaths(tmp_path / "runs/tiny")
    wait_for(lambda: steps_done(paths) >= 4, process)
    os.kill(workers_of(paths)[0][1], signal.SIGKILL)
    wait_for(lambda: paths.metrics.exists() and metrics(paths, "attempt").count(2) >= 2, process)
    failures = [r for r in read_lines(paths.events) if r["event"] == "failure"]
    assert [failure["rank"] for failure in failures] == [1]

    os.killpg(process.pid, signal.SIGKILL)
    for pid in workers_of(paths)[1]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.communicate(timeout=60)

    status = dstune("status", paths.root, "--json").communicate(timeout=60)[0]
    assert (json.loads(status)["state"], json.loads(status)["interrupted"]) == ("failed", True)

    again = dstune("train", run)
    assert again.wait(60) == 2, "an existing run is never silently continued"
    assert "dstune resume" in again.communicate()[1]

    resumed = dstune("resume", paths.root, "--json")
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    ended = json.loads(out)
    assert ended["state"] == "succeeded"
    predicted, measured = (ended["compared"][side]["peak_memory_bytes"] for side in ("predicted", "measured"))
    assert measured == pytest.approx(predicted, rel=0.2)
    assert_exact(paths, reference)
    assert "Traceback" not in err


def test_stop_saves_first_and_resume_on_one_worker_reads_the_same_data(reference: RunPaths, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    process = dstune("train", run)
    paths = RunPaths(tmp_path / "runs/tiny")
    wait_for(lambda: steps_done(paths) >= 2, process)
    os.kill(process.pid, signal.SIGINT)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 75, err
    stopped_at = steps_done(paths)
    assert (paths.checkpoints / f"step-{stopped_at:08d}/manifest.json").exists()
    resumed = dstune("resume", paths.root, "cluster.workers=1")
    err = resumed.communicate(timeout=300)[1]
    assert resumed.returncode == 0, err
    assert metrics(paths, "batch_digest") == metrics(reference, "batch_digest")
    ours, theirs = metrics(paths, "loss"), metrics(reference, "loss")
    assert max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)) < 1e-3
    refused = dstune("resume", paths.root, "train.lr=1.0")
    assert refused.wait(60) == 2
    assert "train.lr" in refused.communicate()[1]
    assert rundir.load(paths).config.train.lr == 1e-3
