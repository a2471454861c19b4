import bisect
import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstune.data.pack import one_per_row, pack


def _lengths(count, median, spread, max_length, seed=0):
    drawn = np.random.RandomState(seed).lognormal(np.log(median), spread, count)
    return np.clip(drawn.astype(np.int32), 1, max_length)


def _naive_best_fit_decreasing(lengths, max_length):
    """One example at a time, into the fullest row that holds it: the rows' fills, sorted."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        place = bisect.bisect_left(free, length)
        room = free.pop(place) if place < len(free) else max_length
        bisect.insort(free, room - length)
    return sorted(max_length - room for room in free)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=120), st.integers(40, 90))
def test_groups_pack_exactly_as_single_examples_would(lengths, max_length):
    packing = pack(np.array(lengths), max_length)
    fills = packing.totals(np.array(lengths))
    assert sorted(fills.tolist()) == _naive_best_fit_decreasing(lengths, max_length)
    assert np.array_equal(np.sort(packing.items), np.arange(len(lengths)))


def test_a_million_examples_fill_the_rows():
    lengths = _lengths(1_000_000, 350, 0.8, 4096)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        packing = pack(lengths, 4096)
        seconds.append(time.perf_counter() - start)
    fills = packing.totals(lengths)
    assert fills.max() <= 4096
    assert fills.sum() / (packing.num_rows * 4096) >= 0.9995
    assert np.array_equal(np.sort(packing.items), np.arange(len(lengths)))
    assert min(seconds) < 1.0  # 0.08 s on a quiet core; this machine may be busy


def test_the_same_lengths_give_the_same_rows():
    lengths = _lengths(5000, 60, 1.0, 512)
    first, second = pack(lengths, 512), pack(lengths.astype(np.int64).copy(), 512)
    assert first.items.tobytes() == second.items.tobytes()
    assert first.offsets.tobytes() == second.offsets.tobytes()
    digest = hashlib.sha256(first.items.astype("<i4").tobytes() + first.offsets.astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "d057a1fb37ff4b08"


def test_neighbours_of_one_length_do_not_stay_together():
    packing = pack(np.full(10_000, 100), 400)
    spans = [
        np.ptp(packing.items[start:stop]) for start, stop in zip(packing.offsets, packing.offsets[1:], strict=False)
    ]
    assert np.median(spans) > 2000


def test_edges():
    assert pack(np.array([], dtype=np.int32), 8).num_rows == 0
    assert pack(np.array([8]), 8).items.tolist() == [0]
    assert pack(np.array([8, 8, 1]), 8).num_rows == 3
    assert pack(np.array([5, 4, 3, 4]), 8).num_rows == 2
    for bad in ([9], [0], [-1, 3]):
        with pytest.raises(ValueError):
            pack(np.array(bad), 8)


def test_one_per_row():
    packing = one_per_row(3)
    assert packing.num_rows == 3
    assert packing.totals(np.array([7, 8, 9])).tolist() == [7, 8, 9]
    assert one_per_row(0).totals(np.array([], dtype=np.int32)).tolist() == []
