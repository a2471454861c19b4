"""Writing the Arrow files of a prepared directory: the same examples give the same bytes, hashed on their way to the disk."""

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dstune import atomic
from dstune.data.block import Block
from dstune.data.column import Column
from dstune.data.shards import EXAMPLE_SCHEMA, ROW_SCHEMA
from dstune.paths import PreparedPaths

BATCH_EXAMPLES = 1000
BATCH_TOKENS = 1 << 22
"""A record batch ends at whichever comes first: memory while writing stays bounded for long examples too."""
SHARD_EXAMPLES = 250_000
SHARD_TOKENS = 1 << 27
"""A shard ends likewise: half a gigabyte of tokens."""
_ROWS_PER_BATCH = 10_000


@dataclass(frozen=True)
class WrittenFile:
    """One file of a prepared directory, as its manifest lists it."""

    name: str
    """Relative to the directory."""
    bytes: int
    sha256: str
    rows: int | None = None
    """Of Arrow files: a stream that was cut between two batches still reads well, only its count tells."""

    def to_dict(self) -> dict[str, Any]:
        value: dict[str, Any] = {"name": self.name, "bytes": self.bytes, "sha256": self.sha256}
        return value if self.rows is None else value | {"rows": self.rows}


class HashedFile(io.RawIOBase):
    """A new file that hashes what is written into it and is on the disk once it is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.num_bytes = 0
        self._digest = hashlib.sha256()
        self._file: BinaryIO = path.open("wb")

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._file.write(view)
        self.num_bytes += len(view)
        return len(view)

    def close(self) -> None:
        if not self.closed:
            super().close()
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())

    def discard(self) -> None:
        """Let go of a file that will not be needed; harmless after `close`."""
        if not self.closed:
            super().close()
            with contextlib.suppress(OSError):
                self._file.close()

    def written(self, rows: int | None = None) -> WrittenFile:
        """What the manifest says of this file."""
        return WrittenFile(self.path.name, self.num_bytes, self._digest.hexdigest(), rows)


class StoredArray:
    """Rows of one array, written one lot after the other to a file that `mapped` opens again: memory does not grow with them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO = path.open("wb")
        self._kind: Any = None
        self._columns = self._rows = 0

    def add(self, rows: npt.NDArray[Any]) -> None:
        """Write `rows` [n, columns], all lots of one kind and width."""
        self._kind, self._columns = rows.dtype, rows.shape[1]
        self._rows += len(rows)
        self._file.write(np.ascontiguousarray(rows).data)

    def mapped(self) -> npt.NDArray[Any] | None:
        """All rows, mapped from the file; None where there are none."""
        self._file.close()
        if not self._rows:
            return None
        return np.memmap(self._path, dtype=self._kind, mode="r", shape=(self._rows, self._columns))

    def remove(self) -> None:
        """Close and delete the file."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def write_hashed(path: Path, content: bytes) -> WrittenFile:
    """Write a whole small file."""
    with HashedFile(path) as file:
        file.write(content)
    return file.written()


def _column(values: npt.NDArray[Any]) -> pa.Array:
    """`values` as they are; `pa.array` would import pandas to find out that they are none of its columns."""
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _list_column(offsets: npt.NDArray[Any], values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(_column(offsets.astype(np.int32)), values)


def _packed_bits(mask: npt.NDArray[np.bool_]) -> pa.Array:
    """Booleans whose unused last bits are zero, so that equal masks are equal bytes."""
    bits = pa.py_buffer(np.packbits(mask, bitorder="little").tobytes())
    return pa.Array.from_buffers(pa.bool_(), len(mask), [None, bits])


def _offsets(lengths: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def _example_batch(block: Block) -> pa.RecordBatch:
    offsets = _offsets(block.lengths)
    assert len(block.ids) == len(block.mask) == offsets[-1], "ids and mask of an example differ in length"
    columns = [
        _list_column(offsets, _column(block.ids)),
        _list_column(offsets, _packed_bits(block.mask)),
        _column(block.lengths),
        _column(block.files),
        _column(block.lines),
        _column(block.parts),
    ]
    return pa.record_batch(columns, schema=EXAMPLE_SCHEMA)


class ShardWriter:
    """Examples in, `data-XXXXX-of-XXXXX.arrow` out; where batches and shards end depends on the blocks alone."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._pending: list[Block] = []
        self._pending_examples = self._pending_tokens = 0
        self._file: HashedFile | None = None
        self._stream: Any = None
        self._shard_examples = 0
        self._shard_tokens = 0
        self._written: list[WrittenFile] = []
        self._lengths, self._supervised, self._files = Column(np.int32), Column(np.int32), Column(np.int32)

    def add(self, block: Block) -> None:
        """Take some examples; every so often this writes a batch. Raises OSError (a full disk) as it comes."""
        if not block.num_examples:
            return
        self._pending.append(block)
        self._pending_examples += block.num_examples
        self._pending_tokens += block.num_tokens
        if self._pending_examples >= BATCH_EXAMPLES or self._pending_tokens >= BATCH_TOKENS:
            self._write_batch()

    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of every example written so far, by number; whole after `finish`."""
        return self._lengths.values()

    def supervised(self) -> npt.NDArray[np.int32]:
        """Targets of every example written so far, by number."""
        return self._supervised.values()

    def files(self) -> npt.NDArray[np.int32]:
        """Index of the file that every example written so far comes from, by number."""
        return self._files.values()

    def finish(self) -> list[WrittenFile]:
        """Write what is left, give the shards their final names and return them."""
        self._write_batch()
        self._end_shard()
        final: list[WrittenFile] = []
        for number, file in enumerate(self._written):
            name = PreparedPaths(self._root).data(number, len(self._written))
            (self._root / file.name).rename(name)
            final.append(WrittenFile(name.name, file.bytes, file.sha256, file.rows))
        return final

    def close(self) -> None:
        """Let go of an open file without finishing it; harmless after `finish`."""
        if self._file is not None:
            self._file.discard()
            self._file = None

    def _write_batch(self) -> None:
        if not self._pending:
            return
        if self._file is None:
            self._file = HashedFile(self._root / f"data-{len(self._written):05d}.arrow")
            self._stream = pa.ipc.new_stream(self._file, EXAMPLE_SCHEMA)
        block = Block.joined(self._pending)
        self._stream.write_batch(_example_batch(block))
        self._lengths.add(block.lengths)
        self._supervised.add(block.supervised())
        self._files.add(block.files)
        self._shard_examples += block.num_examples
        self._shard_tokens += block.num_tokens
        self._pending, self._pending_examples, self._pending_tokens = [], 0, 0
        if self._shard_examples >= SHARD_EXAMPLES or self._shard_tokens >= SHARD_TOKENS:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._file is None:
            return
        self._stream.close()
        self._file.close()
        self._written.append(self._file.written(rows=self._shard_examples))
        self._file = None
        self._shard_examples = self._shard_tokens = 0


def write_rows(
    root: Path, items: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], tokens: Any, supervised: Any
) -> WrittenFile:
    """Write `rows.arrow`: row r holds examples `items[offsets[r]:offsets[r + 1]]`; tokens and supervised: [rows]."""
    num_rows = len(offsets) - 1
    with HashedFile(PreparedPaths(root).rows) as file, pa.ipc.new_stream(file, ROW_SCHEMA) as stream:
        for first in range(0, num_rows, _ROWS_PER_BATCH):
            last = min(first + _ROWS_PER_BATCH, num_rows)
            here = offsets[first : last + 1]
            columns = [
                _list_column(here - here[0], _column(items[here[0] : here[-1]].astype(np.int32))),
                _column(np.asarray(tokens[first:last], dtype=np.int32)),
                _column(np.asarray(supervised[first:last], dtype=np.int32)),
            ]
            stream.write_batch(pa.record_batch(columns, schema=ROW_SCHEMA))
    return file.written(rows=num_rows)


def write_dataset_files(root: Path, shards: Sequence[WrittenFile], fingerprint: str) -> list[WrittenFile]:
    """Write what `datasets.load_from_disk` wants beside the shards; `fingerprint`: 16 hexadecimal digits of the content."""
    paths = PreparedPaths(root)
    features = {name.name: _feature(name.type) for name in EXAMPLE_SCHEMA}
    info: dict[str, Any] = {"citation": "", "description": "", "features": features, "homepage": "", "license": ""}
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard.name} for shard in shards],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    return [
        write_hashed(paths.dataset_info, atomic.dump_json(info).encode()),
        write_hashed(paths.dataset_state, atomic.dump_json(state).encode()),
    ]


def _feature(kind: Any) -> dict[str, Any]:
    """An Arrow type in the words of `datasets`."""
    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    return {"dtype": str(kind), "_type": "Value"}
