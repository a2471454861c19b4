"""Safetensors files of known content, several at a time: each is a stream of pieces, one read and cast while another is written."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any, Protocol

import torch

from dstune.atomic import dump_json, durable_file
from dstune.checkpoint.direct import BLOCK_BYTES, DirectFile, Staging
from dstune.checkpoint.pages import whole_pages

_LENGTH_BYTES = 8

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


def write(
    parts: Sequence[Part],
    directory: Path,
    max_file_bytes: int,
    *,
    stem: str = "model",
    facts: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    threads: int = 1,
) -> list[Path]:
    """Write the parts as safetensors, at most `max_file_bytes` a file (a larger part alone), with an index where they are several.

    `threads` files are written at a time; each takes two blocks of memory and a part's piece. `facts` goes into the index,
    `metadata` into each file's header.
    """
    groups = list(_divided(parts, max_file_bytes))
    names = [f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    paths = [directory / name for name in (names if len(groups) > 1 else [f"{stem}.safetensors"])]
    with ThreadPoolExecutor(min(threads, max(1, len(groups)))) as pool:
        list(pool.map(_write_file, paths, groups, repeat(metadata or {})))
    if len(groups) > 1:
        file_of = {
            name: path.name
            for path, group in zip(paths, groups, strict=True)
            for part in group
            for name in part.outlines
        }
        totals = {"total_size": sum(map(_part_bytes, parts)), **(facts or {})}
        with durable_file(directory / f"{stem}.safetensors.index.json") as out:
            out.write(dump_json({"metadata": totals, "weight_map": dict(sorted(file_of.items()))}).encode("utf-8"))
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


def _write_file(path: Path, parts: list[Part], metadata: Mapping[str, str]) -> None:
    with DirectFile(path) as file, Staging(file) as staging:
        staging.put(torch.frombuffer(bytearray(_head(parts, metadata)), dtype=torch.uint8))
        for part in parts:
            for name, outline in part.outlines.items():
                left = _bytes(outline)
                for piece in part.pieces(name):
                    assert piece.dtype is outline.dtype, name
                    left -= piece.nbytes
                    for block in piece.contiguous().reshape(-1).view(torch.uint8).split(BLOCK_BYTES):
                        staging.put(block)
                assert left == 0, name
        staging.flush()
        file.finish()


def _head(parts: list[Part], metadata: Mapping[str, str]) -> bytes:
    """A file's length word and header, padded by spaces so that the tensors begin at a page."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for part in parts:
        for name, tensor in part.outlines.items():
            begin, end = end, end + _bytes(tensor)
            entry = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
            header[name] = entry
    text = json.dumps(header).encode("utf-8")
    length = whole_pages(_LENGTH_BYTES + len(text)) - _LENGTH_BYTES
    return length.to_bytes(_LENGTH_BYTES, "little") + text.ljust(length)


def _part_bytes(part: Part) -> int:
    return sum(_bytes(tensor) for tensor in part.outlines.values())


def _bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()
