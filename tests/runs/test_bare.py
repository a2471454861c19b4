"""Workers that torchrun or srun started, without Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dstune.paths import RunPaths
from tests.runs.tiny import assert_exact, write_run
from tests.spawn import free_port

pytestmark = pytest.mark.dist

WORKER = [sys.executable, "-m", "dstune.cli.main", "worker"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}


def test_torchrun_starts_the_same_run(reference: RunPaths, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    run = write_run(tmp_path)
    done = subprocess.run(
        [*command, "dstune.cli.main", "worker", str(run)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_exact(RunPaths(tmp_path / "runs/tiny"), reference)


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
