"""Fixtures for every room: the developers' shared data (skipped by name where it is not there), a cache of its own."""

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("DSTUNE_SHARED", Path(__file__).parent.parent.parent / "shared"))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two streams for tools/check: what waits for Slurm's daemons, and beside it all the rest, each in its usual order."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("slurm" if item.get_closest_marker("slurm") else "rest"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data goes to a directory of this test session, never to the user's cache."""
    os.environ["DSTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
