"""An object store that speaks S3, for the tests of this room."""

import logging
from collections.abc import Iterator

import pytest
from pyarrow import fs

BUCKET = "bucket"


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
