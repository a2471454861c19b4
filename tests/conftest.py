"""Fixtures for every room: the developers' shared data (skipped by name where it is not there), a cache of its own, an S3 server."""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from xdist import is_xdist_worker
from xdist.scheduler import LoadScopeScheduling

BUCKET = "bucket"
SHARED = Path(os.environ.get("DSTUNE_SHARED", Path(__file__).parent.parent.parent / "shared"))

# NOTE: before torch is imported. A process forked off one whose torch has threads waits for them for ever.
os.environ.setdefault("OMP_NUM_THREADS", "1")

WITH_WORKERS = tuple(f"tests/{room}/" for room in ("engine", "launch", "runs"))
"""Rooms most of whose tests start workers or a Ray of their own: one at a time, on a machine that may have two cores."""
LATER = ("test_swapping", "test_weights_on_nvme")
"""They want what `tools/check` builds meanwhile: not among the first."""


def stream(nodeid: str) -> str:
    """For tools/check: what goes one after the other. Slurm's tests often wait for its daemons."""
    file = nodeid.partition("::")[0]
    return (
        "slurm"
        if "slurm" in nodeid
        else "workers"
        if file.startswith(WITH_WORKERS) and Path(file).stem not in LATER
        else file
    )


class Streams(LoadScopeScheduling):
    """Each process of xdist takes a stream, and when it has done it the next."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # by the number of tests, which says nothing of their time

    def _split_scope(self, nodeid: str) -> str:
        return stream(nodeid)


def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """The two longest streams begin."""
    if is_xdist_worker(session):
        items.sort(key=lambda item: ("workers", "slurm", stream(item.nodeid)).index(stream(item.nodeid)))


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Streams:
    return Streams(config, log)


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: garbage is looked for among what comes after them."""
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Prepared data goes to a directory of this test session, never to the user's cache."""
    os.environ["DSTUNE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def _s3_server() -> Iterator[str]:
    """The address of moto's server, which forgets everything when it stops."""
    server_module = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture()
def s3(_s3_server: str, monkeypatch: pytest.MonkeyPatch) -> fs.S3FileSystem:
    """A filesystem to write with, holding an empty bucket; the environment tells dstune where it is."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    system = fs.S3FileSystem(
        access_key="key",
        secret_key="secret",
        region="us-east-1",
        scheme="http",
        endpoint_override=_s3_server.removeprefix("http://"),
        allow_bucket_creation=True,
    )
    system.create_dir(BUCKET)
    system.delete_dir_contents(BUCKET)
    return system
