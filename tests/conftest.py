"""Fixtures for every room: the developers' shared data (skipped by name where it is not there), a cache of its own."""

import os
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

SHARED = Path(os.environ.get("DSTUNE_SHARED", Path(__file__).parent.parent.parent / "shared"))


class TwoStreams(LoadScopeScheduling):
    """For tools/check: what waits for Slurm's daemons, and beside it all the rest, each in its usual order."""

    def _split_scope(self, nodeid: str) -> str:
        return "slurm" if "slurm" in nodeid else "rest"


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TwoStreams:
    return TwoStreams(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data goes to a directory of this test session, never to the user's cache."""
    os.environ["DSTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
