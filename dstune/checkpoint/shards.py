"""One worker's shard: a safetensors file that is hashed while it is written, and read piece by piece."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstune.atomic import durable_file
from dstune.checkpoint.layout import FileRecord, SliceEntry
from dstune.errors import CheckpointError, Problem
from dstune.protocols import Slice

_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHUNK_ELEMENTS = 4 << 20
_MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""


@dataclass(frozen=True)
class StoredSlice:
    """A slice in a shard: what it is, and where its bytes stand."""

    entry: SliceEntry
    dtype: torch.dtype
    first_byte: int
    """From the beginning of the file."""


def write_shard(path: Path, slices: Sequence[Slice], step: int) -> FileRecord:
    """Write and flush one shard; size and SHA-256 are of what was handed to the file, not of what came back from it.

    Raises CheckpointError where an element is not finite (such a state is never committed), OSError where the disk fails.
    """
    digest = hashlib.sha256()
    size = 0
    with durable_file(path) as file:
        for block in _blocks(slices, step):
            file.write(block)
            digest.update(block)
            size += len(block)
    return FileRecord(size, digest.hexdigest())


def _blocks(slices: Sequence[Slice], step: int) -> Iterator[bytes | memoryview]:
    header = _header(slices, step)
    yield len(header).to_bytes(8, "little")
    yield header
    for piece in slices:
        for chunk in piece.tensor.detach().split(_CHUNK_ELEMENTS):
            if chunk.is_floating_point() and not torch.isfinite(chunk).all():
                raise CheckpointError(Problem(f"{piece.state}/{piece.name}", "holds NaN or infinity", "finite numbers"))
            yield memoryview(chunk.cpu().contiguous().view(torch.uint8).numpy())


def _header(slices: Sequence[Slice], step: int) -> bytes:
    """The safetensors header, padded by spaces to a multiple of 8 so that the tensors are aligned."""
    tensors: dict[str, Any] = {}
    layout: dict[str, Any] = {}
    end = 0
    for piece in slices:
        key = f"{piece.state}/{piece.name}"
        assert key not in tensors, f"two slices of {key} in one worker"
        begin, end = end, end + piece.tensor.numel() * piece.tensor.element_size()
        dtype = _DTYPE_NAMES[piece.tensor.dtype]
        tensors[key] = {"dtype": dtype, "shape": [piece.tensor.numel()], "data_offsets": [begin, end]}
        layout[key] = {"state": piece.state, "name": piece.name, "shape": list(piece.shape), "offset": piece.offset}
    metadata = {"format": "dstune-shard-1", "step": str(step), "slices": json.dumps(layout)}
    text = json.dumps({"__metadata__": metadata} | tensors).encode("utf-8")
    return text + b" " * (-len(text) % 8)


def read_header(path: Path) -> list[StoredSlice]:
    """What a shard holds. Raises CheckpointError where the file is not what `write_shard` writes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        layout = json.loads(metadata["slices"])
        stored = [_stored(layout[key], record, 8 + length) for key, record in header.items()]
        if 8 + length + sum(_bytes(piece) for piece in stored) != size:
            raise ValueError("its tensors do not fill it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(Problem(str(path), f"is no shard of a checkpoint: {error!r}")) from None
    return stored


def _stored(layout: Mapping[str, Any], record: Mapping[str, Any], data_start: int) -> StoredSlice:
    begin, end = record["data_offsets"]
    (length,) = record["shape"]
    entry = SliceEntry(layout["state"], layout["name"], tuple(layout["shape"]), layout["offset"], length)
    piece = StoredSlice(entry, _DTYPES[record["dtype"]], data_start + begin)
    if end - begin != _bytes(piece):
        raise ValueError(f"{layout['name']}: {length} elements in {end - begin} bytes")
    return piece


def _bytes(piece: StoredSlice) -> int:
    return piece.entry.length * piece.dtype.itemsize


class OpenShard:
    """A shard open for reading, by any number of threads: what is asked for goes from the disk straight to where it is wanted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb", buffering=0)

    def copy(self, piece: StoredSlice, start: int, out: torch.Tensor) -> None:
        """Copy `out.numel()` elements, from element `start` of the stored slice on, into `out` (any dtype, any device)."""
        first = piece.first_byte + start * piece.dtype.itemsize
        direct = out.dtype is piece.dtype and out.device.type == "cpu" and out.is_contiguous()
        for target in out.detach().split(_CHUNK_ELEMENTS):
            source = target if direct else torch.empty(target.numel(), dtype=piece.dtype)
            self._read(memoryview(source.view(torch.uint8).numpy()), first)
            first += source.nbytes
            if not direct:
                target.copy_(source)

    def _read(self, into: memoryview, first: int) -> None:
        while into:
            count = os.preadv(self._file.fileno(), [into], first)
            if count == 0:
                raise CheckpointError(Problem(str(self._path), "ends before its last tensor"))
            into, first = into[count:], first + count


def entries(headers: Iterable[Sequence[StoredSlice]]) -> list[SliceEntry]:
    """The entries of several shards' headers."""
    return [piece.entry for header in headers for piece in header]
