"""Data behind addresses is read as if it lay here: a real S3 server, fsspec's filesystems, and what goes wrong with each."""

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from pyarrow import fs

from dstune.config.schema import Source
from dstune.data.sources import digest, expand, read
from dstune.errors import ConfigError, DataError
from tests.conftest import BUCKET

ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(50)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def put(system: fs.FileSystem, key: str, content: bytes) -> str:
    with system.open_output_stream(f"{BUCKET}/{key}", compression=None) as stream:
        stream.write(content)
    return f"s3://{BUCKET}/{key}"


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


def in_arrow(stream: bool) -> bytes:
    sink, rows = pa.BufferOutputStream(), pa.Table.from_pylist(ROWS)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=7)
    return sink.getvalue().to_pybytes()


def values(path: str, **settings: Any) -> list[dict[str, Any] | None]:
    return [record.value for file in expand(Source(path=path, **settings), Path("/")) for record in read(file)]


def names(path: str, **settings: Any) -> list[str]:
    return [file.name for file in expand(Source(path=path, **settings), Path("/"))]


def test_an_object_store_is_read_by_key_pattern_and_directory(s3: fs.S3FileSystem):
    packed = put(s3, "train/a.jsonl.zst", zstandard.compress(LINES))
    table = put(s3, "train/deep/b.parquet", parquet())
    test = put(s3, "test/c.json", json.dumps(ROWS).encode())
    put(s3, "train/notes.md", b"about")
    arrow = [put(s3, f"arrow/{stream}.arrow", in_arrow(stream)) for stream in (True, False)]
    assert values(packed) == values(table) == values(test) == values(arrow[0]) == values(arrow[1]) == ROWS
    assert names(f"s3://{BUCKET}/train") == names(f"s3://{BUCKET}/train/") == [packed, table]
    assert names(f"s3://{BUCKET}/**/*.parquet") == [table]
    assert names(f"s3://{BUCKET}/*/?.js*") == [test, packed]
    assert names(f"s3://{BUCKET}", split="test") == [test]


def test_the_hash_and_the_stamp_of_an_object(s3: fs.S3FileSystem, tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (here,) = expand(Source(path="a.jsonl"), tmp_path)
    (there,) = expand(Source(path=put(s3, "a.jsonl", LINES)), tmp_path)
    assert digest(here) == digest(there)
    before = there.stamp()
    assert before == there.stamp() and before.size == len(LINES)
    put(s3, "a.jsonl", LINES.replace(b"answer 1", b"answer 2"))
    assert there.stamp() != before


def test_what_an_object_store_does_not_give_is_told(s3: fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch):
    put(s3, "a.jsonl", LINES)
    with pytest.raises(ConfigError, match="no file there"):
        names(f"s3://{BUCKET}/b.jsonl")
    with pytest.raises(ConfigError, match="no file there"):
        names("s3://no-such-bucket/*.jsonl")
    with pytest.raises(ConfigError, match="password") as told:
        names("sftp://me:hunter2@host/a.jsonl")
    assert "hunter2" not in str(told.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="endpoint"):
        names(f"s3://{BUCKET}/a.jsonl")


def test_wrong_credentials_are_told(s3: fs.S3FileSystem):
    address = put(s3, "a.jsonl", LINES)

    def unsigned_requests(allowed: bytes) -> None:
        address = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
        asked = urllib.request.Request(address, allowed, {"Content-Type": "text/plain"})
        urllib.request.urlopen(asked, timeout=10).close()

    unsigned_requests(b"0")
    try:
        with pytest.raises(DataError, match="credentials"):
            names(address)
    finally:
        unsigned_requests(b"1000000000")


def test_an_object_is_streamed(s3: fs.S3FileSystem):
    text = "x" * 100_000
    address = put(
        s3, "large.jsonl.zst", zstandard.compress(b"".join(b'{"a": "%s"}\n' % text.encode() for _ in range(600)))
    )
    tracemalloc.start()
    (file,) = expand(Source(path=address), Path("/"))
    assert sum(len(record.value["a"]) for record in read(file) if record.value) == 600 * len(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24 << 20


def test_any_filesystem_of_fsspec(tmp_path: Path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/set/a.jsonl", LINES)
    assert values("memory://set/a.jsonl") == values("memory://set/*.jsonl") == values("memory://set") == ROWS
    (file,) = expand(Source(path="memory://set/a.jsonl"), tmp_path)
    before = file.stamp()
    memory.pipe("/set/a.jsonl", LINES + LINES)
    assert file.stamp() != before
    (tmp_path / "b.jsonl").write_bytes(LINES)
    assert values(f"file://{tmp_path}/*.jsonl") == ROWS


def test_a_run_prepared_from_an_object_store_by_the_command(s3: fs.S3FileSystem, tmp_path: Path):
    sources = [
        put(s3, "a.jsonl.zst", zstandard.compress(LINES)),
        put(s3, "b/c.parquet", parquet()),
        f"s3://{BUCKET}/b",
        f"s3://{BUCKET}/**/*.zst",
    ]
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "name": "store",
                "model": {"path": "builtin:tiny-llama"},
                "data": {"sources": [{"path": path} for path in sources], "num_processes": 1},
            }
        )
    )
    command = [sys.executable, "-m", "dstune.cli.main", "prepare", str(tmp_path / "run.yaml"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    prepared = Path(json.loads(done.stdout)["prepared"])
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert [one["path"] for one in manifest["sources"]] == [sources[0], sources[1], sources[1], sources[0]]
    assert [one["records"]["read"] for one in manifest["sources"]] == [50] * 4
    assert manifest["sources"][1]["sha256"] == manifest["sources"][2]["sha256"]
    assert "secret" not in json.dumps(manifest)


@pytest.mark.parametrize("address", ["data://x", "s3://", "nowhere://x", "sftp://localhost:9/a"])
def test_an_address_that_cannot_be_opened_is_told(address: str):
    with pytest.raises((ConfigError, DataError), match=address.partition("://")[0]):
        names(address)


def test_a_cut_object_is_told(s3: fs.S3FileSystem):
    for name, content in (
        ("a.jsonl.zst", zstandard.compress(LINES)),
        ("b.jsonl.gz", gzip.compress(LINES)),
        ("c.parquet", parquet()),
    ):
        with pytest.raises(DataError, match=name):
            values(put(s3, name, content[:-20]))
