"""Safetensors files of known content: every tensor's place is settled first, then threads fill the places, piece by piece."""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dstune.atomic import dump_json, durable_file

_DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Part(Protocol):
    """Tensors that are made together, and so stand in one file."""

    @property
    def outlines(self) -> Mapping[str, torch.Tensor]:
        """Name, shape and type of each (without storage)."""
        ...

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor of `outlines` called `name`, flattened, in consecutive pieces. Called once for each, in their order."""
        ...


@dataclass(frozen=True)
class _Place:
    """A part in a file: where its first tensor's first byte stands."""

    file: int
    first_byte: int
    part: Part


def write(
    parts: Sequence[Part],
    directory: Path,
    max_file_bytes: int,
    *,
    stem: str = "model",
    facts: Mapping[str, Any] | None = None,
    threads: int = 1,
) -> list[Path]:
    """Write the parts as safetensors, at most `max_file_bytes` a file (a larger part alone), with an index where they are several.

    Each of `threads` holds one piece at a time. `facts` goes into the index. Returns the files; their bytes are not flushed.
    """
    groups = list(_divided(parts, max_file_bytes))
    names = [f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    paths = [directory / name for name in (names if len(groups) > 1 else [f"{stem}.safetensors"])]
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb", buffering=0)) for path in paths]
        places = [
            place for number, group in enumerate(groups) for place in _laid_out(files[number].fileno(), number, group)
        ]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda place: _fill(files[place.file].fileno(), place), places))
    if len(groups) > 1:
        file_of = {
            name: path.name
            for path, group in zip(paths, groups, strict=True)
            for part in group
            for name in part.outlines
        }
        metadata = {"total_size": sum(map(_part_bytes, parts)), **(facts or {})}
        with durable_file(directory / f"{stem}.safetensors.index.json") as out:
            out.write(dump_json({"metadata": metadata, "weight_map": dict(sorted(file_of.items()))}).encode("utf-8"))
    return paths


def _divided(parts: Sequence[Part], max_bytes: int) -> Iterator[list[Part]]:
    """Parts in runs of at most `max_bytes`; a larger one alone."""
    run: list[Part] = []
    size = 0
    for part in parts:
        if run and size + _part_bytes(part) > max_bytes:
            yield run
            run, size = [], 0
        run.append(part)
        size += _part_bytes(part)
    if run:
        yield run


def _laid_out(descriptor: int, number: int, parts: list[Part]) -> list[_Place]:
    """Write a file's header; the places of its parts."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: list[tuple[int, Part]] = []
    end = 0
    for part in parts:
        places.append((end, part))
        for name, tensor in part.outlines.items():
            begin, end = end, end + _bytes(tensor)
            entry = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            header[name] = entry
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    _write(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
    os.truncate(descriptor, start + end)
    return [_Place(number, start + first, part) for first, part in places]


def _fill(descriptor: int, place: _Place) -> None:
    at = place.first_byte
    for name, outline in place.part.outlines.items():
        end = at + _bytes(outline)
        for piece in place.part.pieces(name):
            assert piece.dtype is outline.dtype, name
            at = _write(descriptor, memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy()), at)
        assert at == end, name


def _write(descriptor: int, content: memoryview, at: int) -> int:
    """Write all of `content` at byte `at`; the byte behind it."""
    while content:
        count = os.pwrite(descriptor, content, at)
        content, at = content[count:], at + count
    return at


def _part_bytes(part: Part) -> int:
    return sum(_bytes(tensor) for tensor in part.outlines.values())


def _bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
