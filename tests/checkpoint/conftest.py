"""Checkpoints that three workers wrote together, and a run's directory around them."""

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from dstune.config.load import load_run
from dstune.engine.control import ControlGroup
from dstune.launch import rundir
from dstune.paths import RunPaths
from tests.checkpoint.sample import commit
from tests.spawn import run_workers

_RUN = """
name: tried
model: {path: builtin:tiny-llama}
data: {sources: [{path: builtin:instructions}]}
checkpoint: {keep: 2, keep_every: 4, best: loss}
"""


def _commit_steps(checkpoints: Path, numbers: list[int]) -> None:
    dist.init_process_group("gloo")
    control = ControlGroup(timedelta(seconds=60))
    for number in numbers:
        commit(checkpoints, number, control)
    control.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def of_three_workers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2, each in three shards."""
    checkpoints = tmp_path_factory.mktemp("checkpoints")
    run_workers(_commit_steps, 3, checkpoints, [1, 2])
    return checkpoints


@pytest.fixture
def checkpoints(of_three_workers: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(of_three_workers, tmp_path / "checkpoints"))


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """A run's directory as `train` makes it, with nothing committed yet."""
    (tmp_path / "run.yaml").write_text(_RUN)
    return rundir.create(load_run(tmp_path / "run.yaml"))
