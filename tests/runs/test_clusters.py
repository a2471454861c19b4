"""The same run through Ray Jobs and through Slurm, with the real worker: submitted, interrupted, gone on with, exact."""

import json
from pathlib import Path
from typing import Any

import pytest

from dstune.paths import RunPaths
from tests.launch.ray_cluster import RayHead
from tests.launch.slurm_cluster import SlurmCluster, ticks
from tests.runs.tiny import assert_exact, dstune, finished, write_run
from tests.spawn import read_lines

LONGER = {"train": {"max_steps": 40}, "checkpoint": {"every": 10}}


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return finished(write_run(tmp_path_factory.mktemp("cluster-reference"), **LONGER))


def said(*words: str | Path) -> Any:
    """What a command answers with --json; it must succeed."""
    process = dstune(*words, "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


def until_step(paths: RunPaths, step: int) -> None:
    for _ in ticks(240):
        if paths.metrics.exists() and len(read_lines(paths.metrics)) >= step:
            return
    raise AssertionError(f"no step {step}: {said('status', paths.root)}")


@pytest.mark.slurm
def test_slurm_warns_the_run_saves_requeues_itself_and_is_exact(
    longer: RunPaths, tmp_path: Path, slurm: SlurmCluster
) -> None:
    run = write_run(tmp_path, **LONGER, cluster={"workers": "auto", "nodes": 2})
    sent = said("submit", run, "--to", "slurm")
    paths = RunPaths(tmp_path / "runs/tiny")
    until_step(paths, 5)
    slurm.run("scancel", "--signal=USR1", "--batch", sent["job_id"])  # as --signal=B:USR1@seconds does
    slurm.wait_for(sent["job_id"], "PENDING")
    saved = said("status", paths.root)
    assert saved["state"] == "queued"
    assert 5 <= saved["step"] < 40
    slurm.release(sent["job_id"])
    slurm.wait_for(sent["job_id"], "COMPLETED", "FAILED", "CANCELLED", seconds=300)
    status = said("status", paths.root)
    assert status["state"] == "succeeded", "\n".join(said("logs", paths.root)["lines"][-40:])
    assert status["attempt"] == 2
    events = read_lines(paths.events)
    assert [event["from_step"] for event in events if event["event"] == "attempt_started"] == [0, saved["step"]]
    assert [event["state"] for event in events if event["event"] == "drive_ended"] == ["preempted", "succeeded"]
    assert_exact(paths, longer)


@pytest.mark.ray
def test_a_ray_job_is_stopped_with_a_commit_resumed_as_a_job_and_exact(
    longer: RunPaths, tmp_path: Path, ray_head: RayHead
) -> None:
    run = write_run(tmp_path, **LONGER)
    said("submit", run, "--to", "ray", "--address", ray_head.address)
    paths = RunPaths(tmp_path / "runs/tiny")
    until_step(paths, 5)
    stopped = said("stop", paths.root, "--wait")
    assert stopped["state"] == "stopped"
    assert 5 <= stopped["step"] < 40
    sent = said("resume", paths.root, "--to", "ray", "--address", ray_head.address)
    assert sent["job_id"]
    lines = said("logs", paths.root, "--follow")["lines"]
    assert any("step 40/40" in line for line in lines), lines[-20:]
    assert said("status", paths.root)["state"] == "succeeded"
    assert_exact(paths, longer)
