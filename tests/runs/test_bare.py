"""Workers that torchrun or srun started, without Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dstune.launch import bare
from dstune.paths import RunPaths
from tests.runs.tiny import assert_exact, write_run
from tests.spawn import free_port

DIST = pytest.mark.dist
WORKER = [sys.executable, "-m", "dstune.cli.main", "worker"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


@DIST
def test_torchrun_starts_the_same_run(reference: RunPaths, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    run = write_run(tmp_path)
    done = subprocess.run(
        [*command, "dstune.cli.main", "worker", str(run)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_exact(RunPaths(tmp_path / "runs/tiny"), reference)


@DIST
def test_srun_like_variables_start_the_same_run(reference: RunPaths, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    processes = [
        subprocess.Popen(
            [*WORKER, str(run)],
            env=ENVIRONMENT
            | {
                "SLURM_PROCID": str(rank),
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_LOCALID": str(rank),
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_JOB_ID": str(os.getpid()),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for port in [free_port()]
        for rank in range(2)
    ]
    for process in processes:
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-3000:]
    assert_exact(RunPaths(tmp_path / "runs/tiny"), reference)


def test_every_worker_has_the_variables_of_the_site_before_it_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's must be the same on all of them. What is wrong with a run worker 0 says alone."""
    monkeypatch.setattr(os, "environ", {})
    (tmp_path / "hpc.yaml").write_text("env: {NCCL_P2P_DISABLE: '1'}\n", "utf-8")
    run = write_run(tmp_path)
    run.write_text("site: hpc.yaml\n" + run.read_text("utf-8"), "utf-8")
    bare.take_environment(run, ())
    assert os.environ == {"NCCL_P2P_DISABLE": "1"}
    bare.take_environment(tmp_path / "nowhere.yaml", ())
    assert os.environ == {"NCCL_P2P_DISABLE": "1"}
