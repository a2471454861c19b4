"""What 8 bits keep of numbers: the largest of a block exactly, the others to the nearest value, and all of it once it was decoded."""

from collections.abc import Iterator

import pytest
import torch

from dstune.engine.blockwise import BLOCK, Blocks, values_of

LENGTH = 4 * BLOCK + 7
CPU = torch.device("cpu")


def _numbers(is_signed: bool) -> Iterator[torch.Tensor]:
    """Blocks of all kinds: even, of many sizes in one, zeros, a single number, tiny, huge, all equal."""
    generator = torch.Generator().manual_seed(0)
    for size in (1.0, 1e-28, 1e30):
        numbers = torch.randn(LENGTH, generator=generator)
        numbers[BLOCK : 2 * BLOCK] *= 10.0 ** torch.empty(BLOCK).uniform_(-9, 0, generator=generator)
        numbers[2 * BLOCK : 3 * BLOCK] = 0
        numbers[2 * BLOCK + 1] = -0.0
        numbers[2 * BLOCK + 3] = -3.0
        numbers[3 * BLOCK : 4 * BLOCK] = -0.5
        yield (numbers if is_signed else numbers.abs()) * size


@pytest.mark.parametrize("is_signed", [True, False])
def test_the_nearest_value_of_the_blocks_largest_number(is_signed: bool) -> None:
    values = values_of(is_signed, CPU)
    for numbers in _numbers(is_signed):
        blocks = Blocks(LENGTH, CPU, is_signed)
        blocks.write(0, numbers)
        for before, after in zip(numbers.split(BLOCK), blocks.read(0, LENGTH).split(BLOCK), strict=True):
            largest = before.abs().max()
            assert after.abs().max() == largest
            shares = before / largest
            nearest = (shares[:, None] - values).abs().amin(dim=1)
            missed = (after / largest - shares).abs() - nearest
            # What is below half of the smallest value becomes that value where there is no sign, never zero.
            assert missed.max() < (1.5e-4 if is_signed else 1.5e-4 + values[1])
            assert is_signed or torch.equal(after > 0, before > 0)
            assert torch.equal(after[before == 0], torch.zeros(int((before == 0).sum())))


@pytest.mark.parametrize("is_signed", [True, False])
def test_what_was_decoded_stays(is_signed: bool) -> None:
    for numbers in _numbers(is_signed):
        first, again = Blocks(LENGTH, CPU, is_signed), Blocks(LENGTH, CPU, is_signed)
        first.write(0, numbers)
        again.write(0, first.read(0, LENGTH))
        assert torch.equal(first.codes, again.codes) and torch.equal(first.scales, again.scales)
        part = slice(BLOCK, 3 * BLOCK)
        again.write(part.start, first.read(part.start, part.stop))
        assert torch.equal(again.read(0, LENGTH), first.read(0, LENGTH))


def test_it_begins_with_zeros_and_what_is_next_to_nothing_is_nothing() -> None:
    for is_signed in (True, False):
        blocks = Blocks(LENGTH, CPU, is_signed)
        assert torch.equal(blocks.read(0, LENGTH), torch.zeros(LENGTH))
        blocks.write(0, torch.full((LENGTH,), 1e-40))
        assert torch.equal(blocks.read(0, LENGTH), torch.zeros(LENGTH))
        assert blocks.codes.nbytes + blocks.scales.nbytes == LENGTH + 4 * 5


def test_values_are_dense_where_numbers_are_large() -> None:
    for is_signed, count in ((True, 255), (False, 256)):
        values = values_of(is_signed, CPU)
        assert len(values.unique()) == count and torch.equal(values, values.sort().values)
        assert values[-1] == 1 and values.diff()[-1] < 0.022 and (values > 0.1).sum() >= 64
        assert 0 < values[values > 0][0] < 1e-6
    assert torch.equal(values_of(True, CPU), -values_of(True, CPU).flip(0))
