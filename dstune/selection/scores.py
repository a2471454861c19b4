"""Scores of training examples, kept beside the prepared data: a row per example with where it came from, its rank, whether it was taken."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dstune import atomic
from dstune.data.shards import Prepared

_ABOUT = b"dstune"
_ROWS_PER_BATCH = 100_000


@dataclass(frozen=True)
class Scored:
    """What a method makes of n examples."""

    rank: npt.NDArray[np.int64]
    """[n] each of 1 .. n once; the lowest are taken."""
    columns: Mapping[str, npt.NDArray[Any]]
    """The method's own numbers, each [n]. No number: NaN, or -1 among integers."""


@dataclass(frozen=True)
class Origins:
    """Where n examples came from and how long they are, each array [n]."""

    source: npt.NDArray[np.int32]
    line: npt.NDArray[np.int64]
    part: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    """Tokens of the answers (what is trained)."""

    @classmethod
    def of(cls, prepared: Prepared) -> "Origins":
        """Read from the prepared directory's columns."""
        batches = list(prepared.batches())
        return cls(
            *(_column(batches, name) for name in ("source", "line", "part", "length")),
            targets=np.concatenate([np.zeros(0, np.int32), *map(_targets, batches)]),
        )


def _column(batches: list[pa.RecordBatch], name: str) -> npt.NDArray[Any]:
    return np.concatenate([batch.column(name).to_numpy(zero_copy_only=False) for batch in batches])


def _targets(batch: pa.RecordBatch) -> npt.NDArray[np.int32]:
    column = batch.column("loss_mask")
    mask = column.flatten().to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy()
    sums = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
    ends = offsets - offsets[0]
    return (sums[ends[1:]] - sums[ends[:-1]]).astype(np.int32)


def write(path: Path, origins: Origins, scored: Scored, wanted: int, about: Mapping[str, Any]) -> None:
    """Write the table at once, whole or not at all; `about` (how it was made) goes into the file's schema as JSON.

    Columns: `example, source, line, part, targets`, the method's own, `rank` (from 1), `chosen` (rank up to `wanted`).
    """
    columns: dict[str, npt.NDArray[Any]] = {
        "example": np.arange(len(scored.rank), dtype=np.int32),
        "source": origins.source,
        "line": origins.line,
        "part": origins.part,
        "targets": origins.targets,
        **scored.columns,
        "rank": scored.rank,
        "chosen": scored.rank <= wanted,
    }
    arrays = [pa.array(values, mask=_missing(values)) for values in columns.values()]
    table = pa.table(arrays, names=list(columns)).replace_schema_metadata({_ABOUT: json.dumps(dict(about))})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_stream(path, table)


def write_stream(path: Path, table: pa.Table) -> None:
    """Write an Arrow stream file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with atomic.durable_file(temporary) as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=_ROWS_PER_BATCH)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    atomic.fsync_directory(path.parent)


def read(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The columns of a scores file; missing numbers are NaN, or -1 among integers."""
    with path.open("rb") as file, pa.ipc.open_stream(file) as stream:
        table = stream.read_all()
    return {name: _filled(table.column(name)) for name in table.column_names}


def _missing(values: npt.NDArray[Any]) -> npt.NDArray[np.bool_] | None:
    if values.dtype.kind == "f":
        return np.isnan(values)
    return values < 0 if values.dtype.kind == "i" else None


def _filled(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    if column.null_count:
        column = column.fill_null(float("nan") if pa.types.is_floating(column.type) else -1)
    return column.combine_chunks().to_numpy(zero_copy_only=False)
