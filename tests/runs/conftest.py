"""What several files of runs want: the clusters of the launch tests, and the uninterrupted run that others are compared with."""

import pytest

from dstune.paths import RunPaths
from tests.launch.conftest import ray_head, slurm
from tests.runs.tiny import finished, write_run

__all__ = ["ray_head", "reference", "slurm"]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """`write_run`'s own 12 steps over 2 workers, undisturbed."""
    return finished(write_run(tmp_path_factory.mktemp("reference")))
