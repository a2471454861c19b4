"""Packing: whole examples into rows of at most `max_length` tokens, best-fit-decreasing over a histogram of lengths.

Best-fit-decreasing takes examples from the longest to the shortest and puts each into the fullest row that still holds it. Equal
examples are interchangeable and so are equally full rows, so whole groups move at once: the cost is that of the distinct
lengths and fills (at most `max_length` of each), not of the examples. Small examples fill the gaps that long ones leave, which
is why real data packs to more than 99.9%.

The length of a sequence-to-sequence example is that of source and target together: a row of sources and a row of targets then hold
`max_length` tokens between them, whichever side has more, and neither is padded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Packing:
    """Rows as one list: row r holds examples `items[offsets[r]:offsets[r + 1]]`."""

    items: npt.NDArray[np.int32]
    """[examples] indices into the lengths that were packed, each exactly once."""
    offsets: npt.NDArray[np.int64]
    """[rows + 1]"""

    @property
    def num_rows(self) -> int:
        return len(self.offsets) - 1

    def totals(self, values: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """The sum of `values` [examples] over each row: [rows]."""
        if self.num_rows == 0:
            return np.zeros(0, dtype=np.int64)
        return np.add.reduceat(values[self.items], self.offsets[:-1], dtype=np.int64)


class _Group(NamedTuple):
    """Rows that are filled alike: `count` rows, each with `each` examples of `length` on top of what `below` holds."""

    below: int
    """The pattern underneath; -1 for an empty row."""
    length: int
    each: int


def one_per_row(num_examples: int) -> Packing:
    """Every example a row of its own."""
    return Packing(np.arange(num_examples, dtype=np.int32), np.arange(num_examples + 1, dtype=np.int64))


def pack(lengths: npt.NDArray[Any], max_length: int) -> Packing:
    """Lay examples of `lengths` [examples] (1 .. max_length tokens each) into rows, none cut, none split.

    The same lengths give the same rows, always. Which examples of one length meet in a row is spread over the whole data, so that
    neighbours in the files are no neighbours in the rows. Raises ValueError for a length outside 1 .. max_length.
    """
    sizes = np.asarray(lengths)
    if sizes.size == 0:
        return one_per_row(0)
    if sizes.min() < 1 or sizes.max() > max_length:
        raise ValueError(f"lengths of {sizes.min()} to {sizes.max()} tokens do not fit rows of {max_length}")
    patterns, finished = _fill(np.bincount(sizes, minlength=max_length + 1), max_length)
    return _lay_out(patterns, finished, _by_length(sizes), np.bincount(sizes, minlength=max_length + 1))


def _fill(histogram: npt.NDArray[Any], max_length: int) -> tuple[list[_Group], list[tuple[int, int]]]:
    """Best-fit-decreasing over groups: all patterns made, and the final groups as (pattern, number of rows).

    `open_rows[c]` lists the groups of rows with c tokens free; bit c of `free` is set where it is not empty. Example: of 7
    examples of length 10 and two rows with 35 free, each row takes 3 (best fit stays with a row until it is full: 35, 25, 15,
    5 free), and one is left for the next fuller kind of row, or for a new one.
    """
    patterns: list[_Group] = []
    open_rows: list[list[tuple[int, int]]] = [[] for _ in range(max_length + 1)]
    free = 0
    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            fitting = free >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                below, count = open_rows[room].pop()
                if not open_rows[room]:
                    free ^= 1 << room
            else:
                room, below, count = max_length, -1, left
            each = min(room // length, left)
            used = min(count, left // each)
            patterns.append(_Group(below, length, each))
            open_rows[room - each * length].append((len(patterns) - 1, used))
            free |= 1 << (room - each * length)
            left -= used * each
            if below >= 0 and used < count:
                open_rows[room].append((below, count - used))
                free |= 1 << room
    return patterns, [group for groups in open_rows for group in groups]


def _by_length(sizes: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Example numbers sorted by length, those of one length in a scrambled order.

    One sort of (length, scrambled number) as a single integer; the scramble is undone afterwards, so no index is sorted along.
    """
    keys = np.empty(len(sizes), dtype=np.uint64)
    for part in _parts(len(sizes)):
        numbers = np.arange(part.start, part.stop, dtype=np.uint64)
        keys[part] = (sizes[part].astype(np.uint64) << np.uint64(32)) | _scramble(numbers)
    keys.sort()
    by_length = np.empty(len(sizes), dtype=np.int32)
    for part in _parts(len(sizes)):
        by_length[part] = _unscramble(keys[part] & np.uint64(0xFFFFFFFF))
    return by_length


def _parts(size: int) -> Iterator[slice]:
    """0 .. size in pieces that a processor's cache holds."""
    for start in range(0, size, _AT_ONCE):
        yield slice(start, min(start + _AT_ONCE, size))


_AT_ONCE = 1 << 16
_FACTOR = 0x9E3779B1
"""Odd, so that multiplying modulo 2**32 can be undone."""


def _scramble(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A one-to-one map of 0 .. 2**32 - 1 onto itself that tears neighbours apart."""
    mixed = (numbers * np.uint64(_FACTOR)) & np.uint64(0xFFFFFFFF)
    return mixed ^ (mixed >> np.uint64(16))


def _unscramble(mixed: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The inverse: shifting by 16 of 32 bits undoes itself, the factor has an inverse modulo 2**32."""
    numbers = mixed ^ (mixed >> np.uint64(16))
    return (numbers * np.uint64(pow(_FACTOR, -1, 1 << 32))) & np.uint64(0xFFFFFFFF)


def _lay_out(
    patterns: list[_Group],
    finished: list[tuple[int, int]],
    by_length: npt.NDArray[np.int32],
    histogram: npt.NDArray[Any],
) -> Packing:
    """Give every group's rows their examples: from each length, the next ones that no row has yet."""
    ends = np.cumsum(histogram)
    next_of = (ends - histogram).tolist()
    blocks: list[npt.NDArray[np.int32]] = []
    row_sizes: list[int] = []
    row_counts: list[int] = []
    for pattern, count in finished:
        columns: list[npt.NDArray[np.int32]] = []
        while pattern >= 0:
            below, length, each = patterns[pattern]
            start = next_of[length]
            next_of[length] = start + each * count
            columns.append(by_length[start : next_of[length]].reshape(count, each))
            pattern = below
        rows = np.concatenate(columns[::-1], axis=1)
        blocks.append(rows.reshape(-1))
        row_sizes.append(rows.shape[1])
        row_counts.append(count)
    sizes = np.repeat(np.array(row_sizes, dtype=np.int64), row_counts)
    return Packing(np.concatenate(blocks), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
