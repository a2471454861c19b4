"""Files with a few bytes turned over, or cut: records and reasons, or an error that names the file; never a traceback."""

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from dstune.config.schema import Source
from dstune.data.conversation import Refused
from dstune.data.formats import to_parts
from dstune.data.sources import expand, read
from dstune.errors import DataError

ROWS = [
    {
        "messages": [{"role": "user", "content": "é" * 9}, {"role": "assistant", "content": "b" * 40}],
        "n": number % 2 or None,
    }
    for number in range(30)
]
TABLE = pa.Table.from_pylist(ROWS).append_column("tag", pa.array(["x", "y"] * 15).dictionary_encode())
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def arrow(compression: str | None, stream: bool) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, TABLE.schema, options=options) as writer:
        writer.write_table(TABLE, max_chunksize=7)
    return sink.getvalue().to_pybytes()


def parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink, row_group_size=7)
    return sink.getvalue().to_pybytes()


def table() -> bytes:
    text = io.StringIO()
    csv.writer(text).writerows([["prompt", "completion"], *([f'"{number}", é\n', "a"] for number in range(30))])
    return text.getvalue().encode()


WHOLE = {
    "stream.arrow": arrow(None, stream=True),
    "file.arrow": arrow("zstd", stream=False),
    "a.parquet": parquet(),
    "a.jsonl": LINES,
    "a.json": json.dumps(ROWS).encode(),
    "a.jsonl.zst": zstandard.compress(LINES),
    "a.jsonl.gz": gzip.compress(LINES),
    "a.csv": table(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_damage_is_found_or_harmless(tmp_path: Path, name: str):
    chance = random.Random(7)
    broken = 0
    for _ in range(150):
        content = bytearray(WHOLE[name])
        if chance.random() < 0.2:
            content = content[: chance.randrange(len(content))]
        for _ in range(chance.randrange(4) if content else 0):
            content[chance.randrange(len(content))] = chance.choice([0, 10, 34, 127, 128, 255, chance.randrange(256)])
        (tmp_path / name).write_bytes(content)
        try:
            (file,) = expand(Source(path=name), tmp_path, 1 << 16)
            for record in read(file):
                if record.value is None:
                    assert record.error is not None and record.error.reason
                    broken += 1
                    continue
                try:
                    assert to_parts(record.value, Source(path=name))
                except Refused as refused:
                    assert refused.detail
        except DataError as error:
            assert name in str(error)
            broken += 1
    assert broken
