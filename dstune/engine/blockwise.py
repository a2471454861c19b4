"""Numbers in 8 bits, in blocks with a scale each (Dettmers et al. 2022, "8-bit optimizers via block-wise quantization"), in plain torch.

A block's numbers over its largest magnitude are rounded to the nearest of 255 or 256 values that lie as densely as a number is large,
over seven decades (the paper's dynamic data type, sections 1.3 and 2.2). Here both 1 and -1 are among them, so a block's largest
number is kept exactly, and what was decoded is encoded to the same again. And a positive number of an unsigned block never becomes zero:
a second moment of zero under a first one that is not would let an update explode.
"""

import functools
from collections.abc import Iterator

import torch

BLOCK = 256
"""Elements with one scale; the paper's for optimizers' states is 2048, bitsandbytes' now 256."""
_DECADES = 7
_LEAST_SCALE = 2.0**-100
"""Blocks whose largest magnitude is below are zero: their smaller values could not be told apart in fp32."""
_DROPPED_BITS = 12
"""Of a float's mantissa, where its code is looked up: sign, exponent and 11 bits remain, a fifteenth of the finest values' distance."""
_INDEX = (1 << (32 - _DROPPED_BITS)) - 1


class Blocks:
    """A run of `length` numbers in 8 bits, zeros at first. The last block may be short."""

    def __init__(self, length: int, device: torch.device, is_signed: bool) -> None:
        self.is_signed = is_signed
        self.codes = torch.full((length,), _ZERO_SIGNED if is_signed else 0, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(-(-length // BLOCK), device=device)

    def read(self, first: int, last: int) -> torch.Tensor:
        """Elements `first` to `last`, in fp32. `first` begins a block, `last` ends one or the run."""
        values = values_of(self.is_signed, self.codes.device)
        out = values.index_select(0, self.codes[first:last].int())
        for part, scales in self._blocks(out, first):
            part.mul_(scales[:, None])
        return out

    def write(self, first: int, numbers: torch.Tensor) -> None:
        """Keep `numbers`, finite ones (and none negative, unless signed), as the elements from `first` on, which begins a block."""
        scaled = torch.empty_like(numbers)
        for (part, scales), (into, _) in zip(self._blocks(numbers, first), self._blocks(scaled, first), strict=True):
            largest = (part.abs() if self.is_signed else part).amax(dim=1)
            scales.copy_(largest).masked_fill_(largest < _LEAST_SCALE, 0.0)
            torch.div(part, largest.clamp_(min=_LEAST_SCALE)[:, None], out=into)
        index = scaled.view(torch.int32).bitwise_right_shift_(_DROPPED_BITS).bitwise_and_(_INDEX)
        codes = _codes(self.is_signed, numbers.device)
        torch.index_select(codes, 0, index, out=self.codes[first : first + numbers.numel()])

    def _blocks(self, numbers: torch.Tensor, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The whole blocks of elements from `first` on, [blocks, 256], and a short last one, [1, length]; each with its scales."""
        count, at = numbers.numel() // BLOCK, first // BLOCK
        if count:
            yield numbers[: count * BLOCK].view(count, BLOCK), self.scales[at : at + count]
        if numbers.numel() > count * BLOCK:
            yield numbers[count * BLOCK :].view(1, -1), self.scales[at + count : at + count + 1]


@functools.cache
def values_of(is_signed: bool, device: torch.device) -> torch.Tensor:
    """What the codes stand for, ascending, in shares of a block's largest magnitude: 255 from -1 to 1, or 256 from 0 to 1.

    Decade by decade each has twice as many as the one below it: the middles of equal parts of [0.1, 1] times a power of ten. The largest
    is 1 in place of the middle of the last part, but beside it where there is no sign, which makes room for one more.
    """
    positive: list[torch.Tensor] = []
    for decade in range(_DECADES):
        edges = torch.linspace(0.1, 1.0, 2 ** (decade + (0 if is_signed else 1)) + 1, dtype=torch.float64)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade + 1 - _DECADES))
    found = torch.cat(positive)
    if is_signed:
        found[-1] = 1.0
        found = torch.cat([-found.flip(0), found.new_zeros(1), found])
    else:
        found = torch.cat([found.new_zeros(1), found, found.new_ones(1)])
    return found.float().to(device)


_ZERO_SIGNED = 2**_DECADES - 1
"""The code of zero among signed values: behind all negative ones."""


@functools.cache
def _codes(is_signed: bool, device: torch.device) -> torch.Tensor:
    """The code of each number by the upper bits of its fp32 form, as of the middle of all numbers that have them."""
    upper = torch.arange(_INDEX + 1, dtype=torch.int64) << _DROPPED_BITS | 1 << (_DROPPED_BITS - 1)
    middles = torch.where(upper < 1 << 31, upper, upper - (1 << 32)).int().view(torch.float32)
    values = values_of(is_signed, torch.device("cpu"))
    codes = torch.bucketize(middles.nan_to_num(), (values[:-1] + values[1:]) / 2)
    if not is_signed:
        codes[1 : len(codes) // 2].clamp_(min=1)  # the half without a sign, but for zero
    return codes.to(torch.uint8).to(device)
