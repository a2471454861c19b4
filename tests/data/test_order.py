import hashlib
import tracemalloc

import numpy as np
import pytest

from dstune.data.order import (
    digest,
    num_steps,
    permute,
    rows_of_step,
    share,
    total_positions,
)


def test_golden_permutations():
    """Literal values: a change of the algorithm is a change of every run's data order, and must not happen unseen."""
    assert permute(42, 0, 10, np.arange(10)).tolist() == [2, 3, 4, 9, 7, 8, 0, 1, 5, 6]
    assert permute(42, 1, 10, np.arange(10)).tolist() == [3, 0, 5, 9, 1, 2, 7, 6, 8, 4]
    assert permute(7, 3, 1_000_003, np.array([0, 1, 2, 1_000_002])).tolist() == [266246, 368141, 98124, 98215]
    huge = permute(2**63 - 1, 2**40, 2**35, np.array([0, 1, 2**35 - 1]))
    assert huge.tolist() == [29341750403, 9841154533, 13189517199]


def _permute_by_python_integers(seed, epoch, num_rows, place):
    """The algorithm a second time, without numpy: what another language would write down from the docstring."""
    mask = 2**64 - 1
    bits = max(6, (num_rows - 1).bit_length())
    left_bits, right_bits = bits // 2, bits - bits // 2
    keys = []
    for number in range(8):
        text = b"dstune order 1" + b"".join(value.to_bytes(8, "little") for value in (seed, epoch, number))
        keys.append(int.from_bytes(hashlib.sha256(text).digest()[:8], "little"))

    def mix(value, key):
        value ^= key
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    while True:
        left, right = place >> right_bits, place & (2**right_bits - 1)
        for number, key in enumerate(keys):
            if number % 2 == 0:
                left ^= mix(right, key) >> (64 - left_bits)
            else:
                right ^= mix(left, key) >> (64 - right_bits)
        place = left << right_bits | right
        if place < num_rows:
            return place


@pytest.mark.parametrize("num_rows", [2, 5, 64, 65, 127, 1000])
def test_numpy_and_plain_integers_agree(num_rows):
    expected = [_permute_by_python_integers(9, 4, num_rows, place) for place in range(num_rows)]
    assert permute(9, 4, num_rows, np.arange(num_rows)).tolist() == expected


@pytest.mark.parametrize("num_rows", [1, 2, 3, 63, 64, 65, 100, 4096, 100_003])
def test_every_row_exactly_once(num_rows):
    for epoch in range(3):
        rows = permute(1, epoch, num_rows, np.arange(num_rows))
        assert np.array_equal(np.sort(rows), np.arange(num_rows))


def test_a_piece_of_the_order_is_the_order_of_the_piece():
    whole = permute(5, 2, 1000, np.arange(1000))
    assert np.array_equal(permute(5, 2, 1000, np.arange(300, 400)), whole[300:400])
    assert permute(5, 2, 1000, np.array([[1, 2], [3, 4]])).shape == (2, 2)


def test_shuffles_well():
    """Every permutation of 4 rows about equally often; places and rows, neighbours and epochs uncorrelated."""
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(1200):
        key = tuple(permute(seed, 0, 4, np.arange(4)).tolist())
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 24
    chi_squared = sum((count - 50) ** 2 / 50 for count in seen.values())
    assert chi_squared < 60  # 23 degrees of freedom: beyond 1 in 10,000
    rows = permute(3, 0, 50_000, np.arange(50_000)).astype(float)
    other = permute(3, 1, 50_000, np.arange(50_000)).astype(float)
    for a, b in [(rows, np.arange(50_000)), (rows[1:], rows[:-1]), (rows, other)]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.02


def test_memory_does_not_grow_with_the_rows():
    place = np.array([123])
    permute(0, 0, 10**15, place)
    tracemalloc.start()
    permute(0, 1, 10**15, place)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


@pytest.mark.parametrize(
    "bad", [(-1, 0, 10, [0]), (2**63, 0, 10, [0]), (0, -1, 10, [0]), (0, 0, 10, [10]), (0, 0, 10, [-1])]
)
def test_places_outside_are_refused(bad):
    seed, epoch, num_rows, places = bad
    with pytest.raises(ValueError):
        permute(seed, epoch, num_rows, np.array(places))


def test_positions():
    assert total_positions(100, None, None, 8) == 100
    assert total_positions(100, 3, None, 8) == 300
    assert total_positions(100, 3, 7, 8) == 56
    assert total_positions(30, 0.1, None, 8) == 3
    assert total_positions(3, 0.01, None, 8) == 1
    assert total_positions(5, 0.5, None, 8) == 3
    assert num_steps(300, 8) == 38
    assert num_steps(0, 8) == 0


def test_steps_run_on_over_the_ends_of_epochs():
    num_rows, batch, positions = 10, 4, 25
    steps = [rows_of_step(num_rows, 42, batch, positions, step) for step in range(num_steps(positions, batch))]
    assert [len(step) for step in steps] == [4, 4, 4, 4, 4, 4, 1]
    run = np.concatenate(steps)
    for epoch in range(3):
        whole = permute(42, epoch, num_rows, np.arange(num_rows))
        assert np.array_equal(run[epoch * 10 : epoch * 10 + 10], whole[: len(run) - epoch * 10])
    with pytest.raises(IndexError):
        rows_of_step(num_rows, 42, batch, positions, 7)


def test_a_batch_larger_than_the_rows():
    rows = rows_of_step(3, 1, 8, 8, 0)
    assert [sorted(rows[:3]), sorted(rows[3:6])] == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8, 64])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_shares_are_equal_in_number_and_cover_every_row_once(num_rows, world_size, micro_batch):
    rows = np.arange(100, 100 + num_rows)
    shares = [share(rows, rank, world_size, micro_batch) for rank in range(world_size)]
    assert len({len(one) for one in shares}) == 1
    assert len({len(micro) for one in shares for micro in one}) == 1
    assert all(len(micro) <= micro_batch for one in shares for micro in one)
    given = sorted(row for one in shares for micro in one for row in micro if row is not None)
    assert given == rows.tolist()
    filled = [sum(row is not None for row in micro) for one in shares for micro in one]
    assert max(filled) - min(filled) <= 1


def test_micro_batches_do_not_depend_on_how_many_workers_run_them():
    rows = list(range(64))
    alone = share(rows, 0, 1, 4)
    for world_size in (2, 4, 8, 16):
        together = [share(rows, rank, world_size, 4) for rank in range(world_size)]
        assert [together[number % world_size][number // world_size] for number in range(16)] == alone


def test_docstring_example():
    assert [share(range(8), rank, 3, 2) for rank in (0, 2)] == [[[0, None], [4, None]], [[2, 3], [6, 7]]]


def test_digest():
    assert digest([3, 1, 2]) == digest(np.array([1, 2, 3])) == "4636993d3e1da4e9"
    assert digest([1, 2, 3]) != digest([1, 2, 2])
    assert digest([1]) == hashlib.sha256(b"\x01\0\0\0").hexdigest()[:16]
