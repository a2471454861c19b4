import numpy as np
import pytest

from dstune.data.schedule import epoch_of_source, held_out, to_nearest
from dstune.errors import DataError

EXAMPLES = np.arange(100, 200)


def test_whole_repeats_take_every_example_so_often():
    assert epoch_of_source(EXAMPLES, 1.0, 42, 0).tolist() == EXAMPLES.tolist()
    assert epoch_of_source(EXAMPLES, 3, 42, 0).tolist() == sorted([*EXAMPLES] * 3)


def test_a_half_is_drawn_by_seed():
    half = epoch_of_source(EXAMPLES, 0.5, 42, 0)
    assert len(half) == len(set(half.tolist())) == 50 and set(half.tolist()) < set(EXAMPLES.tolist())
    assert half.tolist() == epoch_of_source(EXAMPLES, 0.5, 42, 0).tolist()
    assert half.tolist() != epoch_of_source(EXAMPLES, 0.5, 43, 0).tolist()
    assert half.tolist() != epoch_of_source(EXAMPLES, 0.5, 42, 1).tolist()


def test_two_and_a_half():
    taken = epoch_of_source(EXAMPLES, 2.5, 1, 0)
    _, counts = np.unique(taken, return_counts=True)
    assert len(taken) == 250 and sorted(set(counts.tolist())) == [2, 3] and (counts == 3).sum() == 50


def test_shares_are_what_was_written():
    assert to_nearest(0.1, 30) == 3
    assert to_nearest(0.29, 100) == 29
    assert to_nearest(0.5, 5) == 3
    assert len(epoch_of_source(np.arange(0), 0.5, 1, 0)) == 0


def test_a_fraction_is_held_out():
    records = np.arange(1000)
    chosen = held_out(records, 0.01, 42)
    assert chosen.sum() == 10
    assert np.array_equal(chosen, held_out(records, 0.01, 42))
    assert not np.array_equal(chosen, held_out(records, 0.01, 43))


def test_conversations_of_one_record_stay_together():
    records = np.repeat(np.arange(50), np.arange(50) % 5 + 1)
    for seed in range(20):
        chosen = held_out(records, 0.2, seed)
        assert not set(records[chosen].tolist()) & set(records[~chosen].tolist())
        assert abs(chosen.sum() - 0.2 * len(records)) < 5


def test_both_sides_have_something():
    for fraction in (0.001, 0.999):
        chosen = held_out(np.arange(3), fraction, 1)
        assert 0 < chosen.sum() < 3
    for records in ([], [0], [0, 0, 0]):
        with pytest.raises(DataError, match="at least 2"):
            held_out(np.array(records, dtype=np.int64), 0.5, 1)
