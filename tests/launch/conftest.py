"""Clusters for the launch tests: a real Slurm, a real Ray head with a token."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import slurm_cluster
from tests.launch.ray_cluster import RayHead
from tests.launch.slurm_cluster import SlurmCluster


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Two Slurm nodes on this machine, for one module's tests."""
    if why := slurm_cluster.missing():
        pytest.skip(why)
    folder: Path = tmp_path_factory.mktemp("slurm")
    for parent in (folder, *folder.parents[:3]):  # slurmd reads its configuration as other users too
        if parent.name.startswith(("slurm", "popen", "pytest")):
            parent.chmod(0o755)
    with SlurmCluster(folder) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def ray_head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """A Ray cluster of one node with a token; its variables are this process's while it runs."""
    with RayHead(tmp_path_factory.mktemp("head")) as head:
        yield head
