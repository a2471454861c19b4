"""One worker's shard: a safetensors file of slices, what stands where in it, and reading it piece by piece through a memory map."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstune.checkpoint import header
from dstune.checkpoint.host_memory import whole_pages
from dstune.checkpoint.layout import SliceEntry
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
_LENGTH_BYTES = 8
_LONGEST_STEP = "9" * 19


@dataclass(frozen=True)
class StoredSlice:
    """A slice in a shard: what it is, and where its bytes stand."""

    entry: SliceEntry
    dtype: torch.dtype
    first_byte: int
    """From the beginning of the file."""


class ShardLayout:
    """What stands where in a worker's shard: the same in every save of a run. The tensors begin at a page."""

    def __init__(self, slices: Iterable[Slice]) -> None:
        self._tensors: dict[str, Any] = {}
        self._slices: dict[str, Any] = {}
        self.ends: list[int] = []
        """Where each slice ends in the file, in order; each begins where the one before it ends, the first at `data_start`."""
        self.dtypes: list[torch.dtype] = []
        end = 0
        for piece in slices:
            key = f"{piece.state}/{piece.name}"
            assert key not in self._tensors, f"two slices of {key} in one worker"
            begin, end = end, end + piece.tensor.numel() * piece.tensor.element_size()
            dtype = _DTYPE_NAMES[piece.tensor.dtype]
            self._tensors[key] = {"dtype": dtype, "shape": [piece.tensor.numel()], "data_offsets": [begin, end]}
            self._slices[key] = {
                "state": piece.state,
                "name": piece.name,
                "shape": list(piece.shape),
                "offset": piece.offset,
            }
            self.ends.append(end)
            self.dtypes.append(piece.tensor.dtype)
        self.data_start = whole_pages(_LENGTH_BYTES + len(self._header(_LONGEST_STEP)))
        self.ends = [self.data_start + end for end in self.ends]

    @property
    def num_bytes(self) -> int:
        """The whole file's size."""
        return self.ends[-1] if self.ends else self.data_start

    @property
    def keys(self) -> list[str]:
        """`state/parameter` of each slice, in order."""
        return list(self._tensors)

    def head(self, step: int) -> bytes:
        """The file's first `data_start` bytes: the safetensors header, filled up by spaces."""
        length = self.data_start - _LENGTH_BYTES
        return length.to_bytes(_LENGTH_BYTES, "little") + self._header(str(step)).ljust(length)

    def _header(self, step: str) -> bytes:
        metadata = {"format": "dstune-shard-1", "step": step, "slices": json.dumps(self._slices)}
        return json.dumps({"__metadata__": metadata} | self._tensors).encode("utf-8")


def read_header(path: Path) -> list[StoredSlice]:
    """What a shard holds. Raises CheckpointError where the file is not one that dstune wrote."""
    return [stored(piece) for piece in header.read_whole(path).slices]


def stored(piece: header.HeaderSlice) -> StoredSlice:
    """A header's slice with torch's dtype."""
    return StoredSlice(piece.entry, _DTYPES[piece.dtype], piece.first_byte)


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
