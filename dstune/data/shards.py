"""A prepared directory, read: examples and rows memory-mapped from Arrow streams, sizes and counts checked at opening.

Nothing is copied into memory at opening but two integers a row: a million examples open in a fraction of a second, and as many
processes of a machine as like share one copy of the pages.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dstune.atomic import sha256_file
from dstune.data.block import Block
from dstune.errors import DataError, Problem
from dstune.paths import PreparedPaths

FORMAT_VERSION = 1
"""Of the directory's layout; a directory of another version is refused."""

EXAMPLE_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("length", pa.int32()),
        ("source", pa.int32()),
        ("line", pa.int64()),
        ("part", pa.int32()),
    ]
)
ROW_SCHEMA = pa.schema([("examples", pa.list_(pa.int32())), ("tokens", pa.int32()), ("supervised", pa.int32())])

_AGAIN = "Delete this directory and run `dstune prepare` again."


@dataclass(frozen=True)
class StoredExample:
    """One example of a prepared directory, and where it came from. `input_ids` is a view of the file: read-only."""

    input_ids: npt.NDArray[np.int32]
    """[length]"""
    loss_mask: npt.NDArray[np.bool_]
    """[length]; True = this token is a target, not shifted."""
    source: int
    """Index into the manifest's `sources`."""
    line: int
    """Where the record stands in that file, from 1."""
    part: int
    """Which conversation of the record, from 0; where several records stand on one line, which of that line."""


class _Stream:
    """One Arrow stream file, memory-mapped: its record batches and where each begins."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        try:
            with pa.memory_map(str(path)) as mapped, pa.ipc.open_stream(mapped) as reader:
                found = reader.schema.remove_metadata()
                self.batches: list[pa.RecordBatch] = list(reader)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(Problem(str(path), f"no readable Arrow stream ({error})", do=_AGAIN)) from error
        if not found.equals(schema):
            raise DataError(Problem(str(path), f"columns {found}", f"{schema}", _AGAIN))
        counts = [batch.num_rows for batch in self.batches]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    def at(self, index: int) -> tuple[pa.RecordBatch, int]:
        """The batch that holds row `index`, and the row's place in it."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.batches[number], index - int(self.starts[number])

    def column(self, name: str) -> npt.NDArray[np.int32]:
        """A whole flat int32 column, copied."""
        parts = [_flat(batch.column(name), np.int32) for batch in self.batches]
        return np.concatenate([np.zeros(0, dtype=np.int32), *parts])


class _Batch:
    """A record batch of examples as views of its file: Arrow's own way to one element costs ten times as much."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        _, offsets, _, ids = batch.column("input_ids").buffers()
        self._offsets = np.frombuffer(offsets, dtype=np.int32, count=batch.num_rows + 1).tolist()
        self._ids = np.frombuffer(ids, dtype=np.int32, count=self._offsets[-1])
        bits = batch.column("loss_mask").buffers()[3]
        self._bits = np.frombuffer(bits, dtype=np.uint8, count=-(-self._offsets[-1] // 8))
        self._sources = _flat(batch.column("source"), np.int32)
        self._lines = _flat(batch.column("line"), np.int64)
        self._parts = _flat(batch.column("part"), np.int32)

    def example(self, place: int) -> StoredExample:
        start, stop = self._offsets[place], self._offsets[place + 1]
        first = start >> 3
        mask = np.unpackbits(self._bits[first : (stop + 7) >> 3], bitorder="little")[
            start - 8 * first : stop - 8 * first
        ]
        origin = int(self._sources[place]), int(self._lines[place]), int(self._parts[place])
        return StoredExample(self._ids[start:stop], mask.view(np.bool_), *origin)


def read_blocks(path: Path) -> Iterator[Block]:
    """Every example of one shard that was just written, in order, a record batch at a time: read, not mapped, so that none stay."""
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            yield block_of_batch(batch)


def block_of_batch(batch: pa.RecordBatch) -> Block:
    """A record batch of examples, its tokens straight from the mapped file."""
    num_tokens = int(np.frombuffer(batch.column("input_ids").buffers()[1], dtype=np.int32)[batch.num_rows])
    ids = np.frombuffer(batch.column("input_ids").buffers()[3], dtype=np.int32, count=num_tokens)
    bits = np.frombuffer(batch.column("loss_mask").buffers()[3], dtype=np.uint8, count=-(-num_tokens // 8))
    mask = np.unpackbits(bits, count=num_tokens, bitorder="little").view(np.bool_)
    flat = [_flat(batch.column(name), np.int32) for name in ("length", "source", "part")]
    return Block(ids, mask, flat[0], flat[1], _flat(batch.column("line"), np.int64), flat[2])


def _flat(column: Any, kind: type[Any]) -> npt.NDArray[Any]:
    """A fixed-width column as a view of the file (Arrow's own `to_numpy` would import pandas: half a second, 50 MB)."""
    return np.frombuffer(column.buffers()[1], dtype=kind, count=len(column))


def _list_of_int32(column: Any, place: int) -> npt.NDArray[np.int32]:
    """One element of a list<int32> column as a view of the file."""
    _, offsets, _, values = column.buffers()
    start, stop = np.frombuffer(offsets, dtype=np.int32, count=2, offset=4 * place).tolist()
    return np.frombuffer(values, dtype=np.int32, count=stop - start, offset=4 * start)


@dataclass(frozen=True)
class Prepared:
    """An opened prepared directory. Make it by `Prepared.open`."""

    root: Path
    manifest: Mapping[str, Any]
    """`manifest.json` as it stands; DESIGN section 4 and `prepare.py` say what is in it."""
    fingerprint: str
    """SHA-256 of `manifest.json`, which holds every other file's: it names the content of the whole directory."""
    rows_tokens: npt.NDArray[np.int32]
    """[num_rows] tokens of each row."""
    rows_supervised: npt.NDArray[np.int32]
    """[num_rows] targets of each row."""
    _num_examples: int = field(repr=False)
    _rows: _Stream = field(repr=False)
    _batches: list[pa.RecordBatch] = field(repr=False)
    """Every shard's, in order."""
    _batch_starts: list[int] = field(repr=False)
    """Number of each batch's first example."""
    _views: list[_Batch | None] = field(repr=False)
    """Of the batches that were read from."""

    @classmethod
    def open(cls, path: str | Path) -> "Prepared":
        """Open a directory, checking every file's size and every Arrow file's row count against the manifest (not the hashes).

        Raises DataError with every problem found: no manifest, another format version, a missing, cut or foreign file.
        """
        root = Path(path).absolute()
        text, manifest = _read_manifest(root)
        files = {str(file["name"]): file for file in manifest["files"]}
        _check_sizes(root, files)
        names = sorted(name for name in files if name.startswith("data-"))
        shards = tuple(_Stream(root / name, EXAMPLE_SCHEMA) for name in names)
        rows = _Stream(PreparedPaths(root).rows, ROW_SCHEMA)
        streams = [*zip(names, shards, strict=True), (PreparedPaths(root).rows.name, rows)]
        _check_counts(root, [(name, files[name]["rows"], stream.num_rows) for name, stream in streams])
        starts = np.cumsum([0, *(shard.num_rows for shard in shards)], dtype=np.int64)
        _check_counts(root, [("rows.arrow", manifest["counts"]["rows"], rows.num_rows)])
        _check_counts(root, [("data-*", manifest["counts"]["examples"], int(starts[-1]))])
        batches = [batch for shard in shards for batch in shard.batches]
        return cls(
            root=root,
            manifest=manifest,
            fingerprint=hashlib.sha256(text).hexdigest(),
            rows_tokens=rows.column("tokens"),
            rows_supervised=rows.column("supervised"),
            _num_examples=int(starts[-1]),
            _rows=rows,
            _batches=batches,
            _batch_starts=[0, *accumulate(batch.num_rows for batch in batches)][:-1],
            _views=[None] * len(batches),
        )

    @property
    def num_examples(self) -> int:
        return self._num_examples

    @property
    def num_rows(self) -> int:
        return self._rows.num_rows

    @property
    def max_length(self) -> int:
        """The most tokens that a row holds by the settings of the preparation."""
        return int(self.manifest["settings"]["max_length"])

    def row(self, index: int) -> npt.NDArray[np.int32]:
        """The example numbers of one row, in the order in which they lie in it. Raises IndexError outside."""
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.num_rows}")
        batch, place = self._rows.at(index)
        return _list_of_int32(batch.column("examples"), place)

    def row_sizes(self) -> npt.NDArray[np.int64]:
        """[num_rows] how many examples each row holds."""
        offsets = (np.asarray(batch.column("examples").offsets) for batch in self._rows.batches)
        return np.concatenate([np.zeros(0, dtype=np.int64), *map(np.diff, offsets)]).astype(np.int64)

    def example(self, index: int) -> StoredExample:
        """One example, its tokens straight from the mapped file. Raises IndexError outside."""
        if not 0 <= index < self.num_examples:
            raise IndexError(f"example {index} of {self.num_examples}")
        number = bisect_right(self._batch_starts, index) - 1
        view = self._views[number]
        if view is None:
            view = self._views[number] = _Batch(self._batches[number])
        return view.example(index - self._batch_starts[number])

    def origin(self, index: int) -> str:
        """`file:line` (and the part, where it is not the first) of example `index`, the path as the run file wrote it."""
        example = self.example(index)
        text = f"{self.manifest['sources'][example.source]['path']}:{example.line}"
        return f"{text} part {example.part}" if example.part else text

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Every record batch of examples, in order."""
        yield from self._batches

    def largest_token(self) -> int:
        """The largest token number in it (every token is read)."""
        return max(int(batch.column("input_ids").flatten().to_numpy().max()) for batch in self.batches())

    def validation(self) -> "Prepared | None":
        """The held-out examples, opened and checked the same way; None where none were asked for."""
        if self.manifest["validation"] is None:
            return None
        return Prepared.open(PreparedPaths(self.root).validation)

    def verify(self) -> None:
        """Read every byte and compare its SHA-256 with the manifest, the validation set's included.

        Raises DataError naming each file that differs.
        """
        problems = [
            Problem(str(self.root / file["name"]), "the content differs from the manifest's hash", do=_AGAIN)
            for file in self.manifest["files"]
            if sha256_file(self.root / file["name"]) != file["sha256"]
        ]
        if problems:
            raise DataError(problems)
        held_out = self.validation()
        if held_out is not None:
            held_out.verify()


def _read_manifest(root: Path) -> tuple[bytes, dict[str, Any]]:
    path = PreparedPaths(root).manifest
    try:
        text = path.read_bytes()
    except OSError as error:
        do = _AGAIN if root.is_dir() else "Make one: `dstune prepare RUN.yaml`."
        raise DataError(Problem(str(root), f"no prepared directory ({path.name}: {error.strerror})", do=do)) from error
    try:
        manifest = json.loads(text)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(Problem(str(path), "a damaged manifest", do=_AGAIN)) from error
    if version != FORMAT_VERSION:
        raise DataError(Problem(str(path), f"format version {version}", str(FORMAT_VERSION), _AGAIN))
    return text, manifest


def _check_sizes(root: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    problems: list[Problem] = []
    for name, file in files.items():
        try:
            size = (root / name).stat().st_size
        except OSError as error:
            problems.append(
                Problem(str(root / name), error.strerror or "not readable", "a file of the manifest", _AGAIN)
            )
            continue
        if size != file["bytes"]:
            problems.append(Problem(str(root / name), f"{size} bytes", f"{file['bytes']}", _AGAIN))
    if problems:
        raise DataError(problems)


def _check_counts(root: Path, counts: list[tuple[str, int, int]]) -> None:
    problems = [
        Problem(str(root / name), f"{found} rows", f"{expected}", _AGAIN)
        for name, expected, found in counts
        if found != expected
    ]
    if problems:
        raise DataError(problems)
