"""What a damaged shard still tells: which parameters lie in the bytes that are gone, and signs of where it was changed.

The hashes of its blocks say which of them was changed. What can be told where a shard has none, and within a block: a header
that disagrees with the manifest, a header of another step, numbers that are not finite (such are never committed). Headers
are believed only where they agree with the manifest, whose own hash was right.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dstune.checkpoint.header import ITEM_BYTES, HeaderSlice, ShardHeader, parse
from dstune.checkpoint.layout import Manifest, Part, SliceEntry, gaps
from dstune.errors import CheckpointError
from dstune.paths import CheckpointPaths

_CHUNK_ELEMENTS = 4 << 20
_EXPONENTS = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits of which all are set in a number that is not finite."""


def nowhere_else(directory: Path, manifest: Manifest, name: str) -> tuple[Part, ...]:
    """What only the shard `name` can have held: what is in none of the others that can be read."""
    paths = CheckpointPaths(directory)
    others = (paths.shard(rank, manifest.world_size).name for rank in range(manifest.world_size))
    headers = [_header(directory, manifest, other) for other in others if other != name]
    entries = [piece.entry for header in headers if header is not None for piece in header.slices]
    return tuple(gaps(manifest.tensors, entries))


def between(directory: Path, manifest: Manifest, name: str, first: int, last: int) -> tuple[Part, ...]:
    """What stands in the bytes `first` up to `last` of the shard `name`."""
    header = _header(directory, manifest, name)
    if header is None:
        return nowhere_else(directory, manifest, name)
    parts: list[Part] = []
    for piece in header.slices:
        size = ITEM_BYTES[piece.dtype]
        begin = max(0, (first - piece.first_byte) // size)
        end = min(piece.entry.length, -((piece.first_byte - last) // size))
        if begin < end:
            parts.append(_part(piece.entry, begin, end))
    return tuple(parts)


def signs(
    directory: Path, manifest: Manifest, name: str, changed: Sequence[tuple[int, int]] = ()
) -> tuple[str, tuple[Part, ...]]:
    """Of a shard of the right size and the wrong hash: what there is to say, and what is known to be lost.

    `changed`: the blocks in which it was, where that is known.
    """
    header = _header(directory, manifest, name)
    if header is None:
        return "its header is damaged too", nowhere_else(directory, manifest, name)
    if header.step != manifest.step:
        said = f"its header says step {header.step}: it is a shard of another checkpoint"
        return said, tuple(_part(piece.entry, 0, piece.entry.length) for piece in header.slices)
    found = tuple(_not_finite(directory / name, header))
    if found:
        return "it holds numbers that are not finite, which are never committed, and maybe more damage", found
    parts = dict.fromkeys(part for first, last in changed for part in between(directory, manifest, name, first, last))
    if parts and len({(part.state, part.name) for part in parts}) < len(header.slices):
        first, last = changed[0][0], changed[-1][1]
        return f"it was changed between byte {first} and {last}", tuple(parts)
    return f"which of its {len(header.slices)} pieces was changed cannot be told", ()


def _header(directory: Path, manifest: Manifest, name: str) -> ShardHeader | None:
    """The header where it agrees with the manifest; None where there is none to believe."""
    try:
        header = parse(directory / name)
    except CheckpointError:
        return None
    size = manifest.files[name].bytes
    return header if header.num_bytes == size and all(_fits(piece, manifest, size) for piece in header.slices) else None


def _fits(piece: HeaderSlice, manifest: Manifest, size: int) -> bool:
    """The slice is one of a parameter that the manifest has, and lies within the file."""
    entry = piece.entry
    known = manifest.tensors.get(entry.state, {}).get(entry.name) == entry.shape
    return (
        known
        and 0 <= entry.offset <= math.prod(entry.shape) - entry.length
        and 0 < piece.first_byte <= size - piece.num_bytes
    )


def _not_finite(path: Path, header: ShardHeader) -> Iterator[Part]:
    """Of each piece, the elements from the first to the last that is not finite."""
    for piece in header.slices:
        if piece.dtype not in _EXPONENTS:
            continue
        starts = range(0, piece.entry.length, _CHUNK_ELEMENTS)
        bad = [start + int(index) for start in starts for index in _not_finite_of(path, piece, start)]
        if bad:
            yield _part(piece.entry, bad[0], bad[-1] + 1)


def _not_finite_of(path: Path, piece: HeaderSlice, start: int) -> np.ndarray:
    """Where in a chunk the numbers are not finite: the first and the last place."""
    size, exponent = ITEM_BYTES[piece.dtype], _EXPONENTS[piece.dtype]
    count = min(_CHUNK_ELEMENTS, piece.entry.length - start)
    bits = np.fromfile(path, f"<u{size}", count, offset=piece.first_byte + start * size)
    places = np.flatnonzero((bits & exponent) == exponent)
    return places[[0, -1]] if len(places) else places


def _part(entry: SliceEntry, first: int, last: int) -> Part:
    """Elements `first` up to `last` of a slice, as elements of the parameter."""
    return Part(entry.state, entry.name, entry.offset + first, entry.offset + last)
