"""Histograms and pictures of rows as figures to draw: places in per cent of the width, so that a page may be as wide as it likes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dstune.data.preview.text import many
from dstune.data.shards import Prepared

_BEYOND = 2.0
"""Room for what is longer than a row, in bars."""
_TICKS = 8
_FEW = 12
"""So many different numbers have a bar each."""
_COLUMNS = 400
"""Of a row's picture: what is narrower is not drawn."""
_FILL_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1.0)
_QUARTERS = (4, 5, 6, 7)


@dataclass(frozen=True)
class Bar:
    """`x` and `width` are in per cent of the chart's width, `height` in per cent of its highest bar."""

    x: float
    width: float
    height: float
    label: str
    count: int
    beyond: bool = False
    """Counted, but not in the data: left out, or cut."""


@dataclass(frozen=True)
class Chart:
    """A histogram."""

    title: str
    unit: str
    """What a bar counts: `example`, `row`."""
    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    """Places of the axis, in per cent, and what is written there."""
    centred: bool
    """The ticks stand under the middle of their bars, and not where these end."""
    limit: tuple[float, str] | None = None
    """A line across, and what it means."""

    @property
    def most(self) -> int:
        return max((bar.count for bar in self.bars), default=0)


def ladder(low: int, high: int) -> list[int]:
    """Upper ends of bins for whole numbers low .. high: about equally wide in the logarithm; the last is `high`.

    ladder(10, 40) = [12, 14, 16, 20, 24, 28, 32, 40]; over more than six octaves only every other of them.
    """
    steps = _QUARTERS if high <= 64 * max(1, low) else _QUARTERS[::2]
    ends = [step * 2**octave // 4 for octave in range(high.bit_length() + 1) for step in steps]
    return [*sorted({end for end in ends if max(1, low) <= end < high}), high]


def _drawn(
    title: str,
    unit: str,
    counts: Sequence[int],
    labels: Sequence[str],
    names: Sequence[str],
    beyond: tuple[str, int] | None = None,
    centred: bool = False,
) -> Chart:
    """Bars of equal width. `names`: what is written under the right end of each, or under its middle; not under all of them.

    `beyond`: one more bar behind a line.
    """
    wide = 100 / (len(counts) + (_BEYOND if beyond else 0))
    most = max(*counts, beyond[1] if beyond else 0, 1)
    bars = [
        Bar(place * wide, wide, 100 * count / most, label, count)
        for place, (count, label) in enumerate(zip(counts, labels, strict=True))
    ]
    last = len(names) - 1
    every = -(-len(names) // _TICKS)
    end = 0.5 if centred else 1
    ticks = tuple(((place + end) * wide, name) for place, name in enumerate(names) if (last - place) % every == 0)
    if not beyond:
        return Chart(title, unit, tuple(bars), ticks, centred)
    over = Bar(100 - 1.5 * wide, 1.5 * wide, 100 * beyond[1] / most, beyond[0], beyond[1], beyond=True)
    return Chart(title, unit, (*bars, over), ticks, centred, (100 - 1.75 * wide, "max_length"))


def of_counts(
    title: str,
    unit: str,
    values: npt.NDArray[Any],
    of_what: str,
    low: int | None = None,
    high: int | None = None,
    beyond: tuple[str, int] | None = None,
) -> Chart:
    """Whole numbers low .. high in bins that widen (see `ladder`), or each by itself where they are few.

    `of_what` they are numbers: `token`, `example`.
    """
    low = int(values.min()) if low is None else low
    top = int(values.max()) if high is None else high
    ends = list(range(low, top + 1)) if top - low < _FEW else ladder(low, top)
    edges = [low, *(end + 1 for end in ends)]
    counts = np.histogram(values, edges)[0].tolist()
    labels = [_between(first, after - 1, of_what) for first, after in pairwise(edges)]
    return _drawn(title, unit, counts, labels, [f"{end:,}" for end in ends], beyond, centred=True)


def _between(first: int, last: int, of_what: str) -> str:
    return many(last, of_what) if first == last else f"{first:,} to {many(last, of_what)}"


def of_shares(title: str, unit: str, shares: npt.NDArray[np.float64]) -> Chart:
    """Shares of 0 .. 1 in twenty bins."""
    counts = np.histogram(shares, np.linspace(0, 1, 21))[0].tolist()
    labels = [f"{5 * place} to {5 * place + 5}%" for place in range(20)]
    return _drawn(title, unit, counts, labels, [f"{5 * place + 5}%" for place in range(20)])


def of_fill(title: str, rows_tokens: npt.NDArray[np.int32], max_length: int) -> Chart:
    """Rows by how full they are, in bins that narrow towards full, which is a bin of its own."""
    edges = [*(int(np.ceil(edge * max_length)) for edge in _FILL_EDGES), max_length + 1]
    counts = np.histogram(rows_tokens, edges)[0].tolist()
    names = [f"{edge:.0%}" for edge in _FILL_EDGES]
    labels = [f"{low} to below {high}" for low, high in pairwise(names)]
    return _drawn(title, "row", counts, [*labels, "full to the last token"], [*names[1:], "full"])


@dataclass(frozen=True)
class RowPicture:
    """One packed row: its examples as blocks, and what is trained. Places in per cent of `max_length`."""

    label: str
    blocks: tuple[tuple[float, float, str], ...]
    """x, width, what it is."""
    trained: tuple[tuple[float, float], ...]


def row_pictures(prepared: Prepared, rows: Sequence[int]) -> list[RowPicture]:
    """The rows with these numbers."""
    return [_row_picture(prepared, row) for row in rows]


def _row_picture(prepared: Prepared, row: int) -> RowPicture:
    numbers = prepared.row(row).tolist()
    room = prepared.max_length
    masks = [prepared.example(number).loss_mask for number in numbers]
    starts = np.cumsum([0, *map(len, masks)]).tolist()
    blocks = [
        (100 * start / room, 100 * len(mask) / room, f"example {number:,}: {many(len(mask), 'token')}")
        for number, mask, start in zip(numbers, masks, starts[:-1], strict=True)
    ]
    tokens = starts[-1]
    label = f"row {row:,}: {many(len(numbers), 'example')}, {many(tokens, 'token')}, {tokens / room:.1%} full"
    return RowPicture(label, tuple(blocks), tuple(_strips(np.concatenate(masks), room)))


def _strips(mask: npt.NDArray[np.bool_], room: int) -> list[tuple[float, float]]:
    """Where at least half of the tokens are targets, in columns of the picture: x and width of each stretch."""
    num_columns = min(_COLUMNS, room)
    columns = np.arange(len(mask), dtype=np.int64) * num_columns // room
    counted = np.bincount(columns, minlength=num_columns)
    trained = np.bincount(columns, weights=mask, minlength=num_columns)
    is_trained = np.concatenate([[False], (trained * 2 >= counted) & (counted > 0), [False]])
    turns = (100 * np.flatnonzero(is_trained[1:] != is_trained[:-1]) / num_columns).tolist()
    return [(start, end - start) for start, end in zip(turns[::2], turns[1::2], strict=True)]
