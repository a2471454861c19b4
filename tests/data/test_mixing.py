import numpy as np
import pytest

from dstune.data.mixing import epoch_shares
from dstune.data.schedule import epoch_of_source


def test_a_temperature_of_one_changes_nothing():
    assert epoch_shares([1000, 7], [0.1, 2.5], 1.0) == [0.1, 2.5]


@pytest.mark.parametrize("temperature", [1.5, 2.0, 5.0, 100.0])
def test_shares_are_the_sizes_to_the_power_of_one_over_the_temperature(temperature):
    sizes, repeats = [10_000, 400, 30], [1.0, 2.0, 0.5]
    shares = epoch_shares(sizes, repeats, temperature)
    drawn = np.array(sizes) * shares
    before = np.array(sizes) * repeats
    assert drawn.sum() == pytest.approx(before.sum())
    assert drawn / drawn[0] == pytest.approx((before / before[0]) ** (1 / temperature))


def test_a_worked_example():
    """900 and 100 examples at temperature 2: roots 30 and 10, so three quarters and a quarter of 1,000."""
    assert epoch_shares([900, 100], [1, 1], 2.0) == pytest.approx([750 / 900, 2.5])


def test_equal_sources_and_one_source_stay_as_they_are():
    assert epoch_shares([50, 50], [1, 1], 3.0) == pytest.approx([1, 1])
    assert epoch_shares([50], [2.0], 3.0) == pytest.approx([2])


def test_empty_sources_keep_their_repeat():
    assert epoch_shares([0, 100, 100], [3.0, 1.0, 1.0], 2.0) == pytest.approx([3, 1, 1])
    assert epoch_shares([0], [3.0], 2.0) == [3.0]
    assert epoch_shares([], [], 2.0) == []


def test_the_schedule_draws_what_the_shares_say():
    sizes = [900, 100]
    shares = epoch_shares(sizes, [1, 1], 2.0)
    drawn = [
        len(epoch_of_source(np.arange(size), share, 42, number))
        for number, (size, share) in enumerate(zip(sizes, shares, strict=True))
    ]
    assert drawn == [750, 250]
