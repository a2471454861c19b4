"""One worker's shard: a safetensors file of slices, what stands where in it, and reading it piece by piece, checked on the way."""

import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstune.checkpoint import header
from dstune.checkpoint.blocks import Blocks
from dstune.checkpoint.layout import SliceEntry
from dstune.checkpoint.pages import whole_pages
from dstune.errors import DamagedCheckpoint, Problem
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
            if key in self._tensors:  # a second run of the same one
                key += f"@{piece.offset}"
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
        """`state/parameter` of each slice, in order; of a worker's further runs of the same one `state/parameter@first`."""
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


class LastBlock(threading.local):
    """The block that each thread read last of those that it wanted only a part of: the next slice often begins in it."""

    def __init__(self) -> None:
        self.shard: Path | None = None
        self.begin = 0
        self.memory = bytearray()


class OpenShard:
    """A shard open for reading, by any number of threads: what is asked for goes from the disk straight to where it is wanted.

    With `blocks`, every byte that is given was checked after it was read: DamagedCheckpoint where it is not what was written.
    Blocks of which only a part is wanted are read whole for that.
    """

    def __init__(self, path: Path, blocks: Blocks | None = None, last_block: LastBlock | None = None) -> None:
        self._path, self._blocks = path, blocks
        self._last = last_block or LastBlock()
        self._file = path.open("rb", buffering=0)

    def copy(self, piece: StoredSlice, start: int, out: torch.Tensor) -> None:
        """Copy `out.numel()` elements, from element `start` of the stored slice on, into `out` (any dtype, any device)."""
        first = piece.first_byte + start * piece.dtype.itemsize
        if out.dtype is piece.dtype and out.device.type == "cpu" and out.is_contiguous():
            self.read_into(memoryview(out.detach().view(torch.uint8).numpy()), first)
            return
        for target in out.detach().split(_CHUNK_ELEMENTS):
            source = torch.empty(target.numel(), dtype=piece.dtype)
            self.read_into(memoryview(source.view(torch.uint8).numpy()), first)
            first += source.nbytes
            target.copy_(source)

    def check_header(self) -> None:
        """Raises DamagedCheckpoint where the header was changed. Without blocks there is nothing to check it by."""
        if self._blocks is not None:
            length = bytearray(_LENGTH_BYTES)
            self.read_into(memoryview(length), 0)
            self.read_into(memoryview(bytearray(int.from_bytes(length, "little"))), _LENGTH_BYTES)

    def close(self) -> None:
        self._file.close()

    def read_into(self, into: memoryview, first: int) -> None:
        """Fill `into` with the bytes of the file from `first` on."""
        if self._blocks is None:
            self._read(into, first)
            return
        last = first + len(into)
        for begin, end in self._blocks.around(first, last):
            part = into[max(begin, first) - first : min(end, last) - first]
            if len(part) == end - begin:
                self._read(part, begin)
                self._require_whole(begin, end, part)
            else:
                at = max(begin, first) - begin
                part[:] = self._block(begin, end)[at : at + len(part)]

    def _block(self, begin: int, end: int) -> memoryview:
        last = self._last
        if (last.shard, last.begin) != (self._path, begin):
            last.shard = None  # until all of it is there, and whole
            if len(last.memory) < end - begin:
                last.memory = bytearray(end - begin)
            memory = memoryview(last.memory)[: end - begin]
            self._read(memory, begin)
            self._require_whole(begin, end, memory)
            last.shard, last.begin = self._path, begin
        return memoryview(last.memory)

    def _require_whole(self, begin: int, end: int, memory: memoryview) -> None:
        assert self._blocks is not None
        if not self._blocks.is_whole(begin, memory):
            came = f"is damaged: byte {begin} to {end} are not what was written"
            raise DamagedCheckpoint(Problem(str(self._path), came))

    def _read(self, into: memoryview, first: int) -> None:
        while into:
            count = os.preadv(self._file.fileno(), [into], first)
            if count == 0:
                raise DamagedCheckpoint(Problem(str(self._path), "ends before its last tensor"))
            into, first = into[count:], first + count


def entries(headers: Iterable[Sequence[StoredSlice]]) -> list[SliceEntry]:
    """The entries of several shards' headers."""
    return [piece.entry for header in headers for piece in header]
