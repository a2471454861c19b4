"""What a preparation holds of each example: numbers in place, nothing of the chunk that they came in."""

import weakref

import numpy as np
import pytest

from dstune.data.column import Column
from dstune.data.duplicates import DeduplicateSection, find_duplicates


def test_a_column_is_what_was_added_in_order():
    column = Column(np.int32)
    assert column.values().tolist() == []
    column.add(np.array([3, 1], np.int64))
    column.add(np.array([], np.int32))
    column.add(np.arange(10, dtype=np.int32)[::3])
    assert column.values().tolist() == [3, 1, 0, 3, 6, 9]
    assert column.values().dtype == np.int32


def test_a_column_does_not_keep_what_it_was_given_a_view_of():
    chunk = np.zeros(1 << 20, np.uint64)
    gone = weakref.ref(chunk)
    column = Column(np.uint64)
    column.add(chunk[:4])
    del chunk
    assert gone() is None
    assert len(column.values()) == 4


def test_a_column_refuses_to_grow_under_a_reader():
    column = Column(np.int64)
    column.add(np.zeros(1, np.int64))
    held = column.values()
    with pytest.raises(BufferError):
        column.add(np.zeros(1000, np.int64))
    assert held.tolist() == [0]


def test_digests_that_share_one_half_are_no_repetitions():
    digests = np.array([[7, 1], [7, 2], [8, 1], [7, 2], [9, 9], [7, 1], [7, 1]], np.uint64)
    found = find_duplicates(digests, None, DeduplicateSection(method="exact"))
    assert found.of.tolist() == [-1, -1, -1, 1, -1, 0, 0]
