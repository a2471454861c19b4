"""What a shard says of itself at its beginning: a safetensors header. Read without torch, so that looking at checkpoints starts at once."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstune.checkpoint.layout import SliceEntry
from dstune.errors import CheckpointError, Problem

ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""The dtypes of slices, by safetensors' names."""
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""


@dataclass(frozen=True)
class HeaderSlice:
    """A slice as the header has it."""

    entry: SliceEntry
    dtype: str
    first_byte: int
    """From the beginning of the file."""

    @property
    def num_bytes(self) -> int:
        return self.entry.length * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardHeader:
    """A whole header."""

    step: int
    slices: list[HeaderSlice]
    num_bytes: int
    """How long the file has to be for all of it."""


def read_whole(path: Path) -> ShardHeader:
    """The header of a shard that is as long as it says. Raises CheckpointError where the file is not what dstune writes."""
    header = parse(path)
    if header.num_bytes != path.stat().st_size:
        raise CheckpointError(Problem(str(path), "is no shard of a checkpoint: its tensors do not fill it"))
    return header


def parse(path: Path) -> ShardHeader:
    """The same of a file that may have been cut behind its header."""
    try:
        if not path.is_file():  # to open a pipe would be to wait for a writer
            raise ValueError("no file")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        layout = json.loads(metadata["slices"])
        end = _LENGTH_BYTES + length
        slices: list[HeaderSlice] = []
        for key, record in header.items():
            slices.append(_slice(layout[key], record, _LENGTH_BYTES + length))
            if slices[-1].first_byte != end:
                raise ValueError(f"{key}: does not begin where the tensor before it ends")
            end += slices[-1].num_bytes
        return ShardHeader(int(metadata["step"]), slices, end)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(Problem(str(path), f"is no shard of a checkpoint: {error!r}")) from None


def _slice(layout: Mapping[str, Any], record: Mapping[str, Any], data_start: int) -> HeaderSlice:
    begin, end = record["data_offsets"]
    (length,) = record["shape"]
    state, name, shape, offset = (layout[key] for key in ("state", "name", "shape", "offset"))
    if not isinstance(state, str) or not isinstance(name, str):
        raise ValueError(f"{state!r}/{name!r}: a name that is no text")
    if not all(type(number) is int and number >= 0 for number in (begin, end, length, offset, *shape)):
        raise ValueError(f"{name}: a place that is no whole number")
    if offset + length > math.prod(shape):
        raise ValueError(f"{name}: elements {offset} to {offset + length} of {math.prod(shape)}")
    piece = HeaderSlice(SliceEntry(state, name, tuple(shape), offset, length), record["dtype"], data_start + begin)
    if end - begin != piece.num_bytes:
        raise ValueError(f"{name}: {length} elements in {end - begin} bytes")
    return piece
