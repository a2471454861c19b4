"""Which examples an epoch holds and how often (`repeat`), and which are held out: drawn by seed, settled while preparing."""

import hashlib
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from dstune.data.order import permute
from dstune.errors import DataError, Problem

NumberArray = npt.NDArray[np.int32]


def draw_seed(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose, so that no two draws of a run are alike: 63 bits of SHA-256."""
    return int.from_bytes(hashlib.sha256(f"dstune {purpose} {seed}".encode()).digest()[:8], "little") >> 1


def to_nearest(share: float, count: int) -> int:
    """`share` (as it was written: 0.1 is a tenth) of `count`, halves upwards."""
    return int(Fraction(repr(float(share))) * count + Fraction(1, 2))


def epoch_of_source(examples: NumberArray, repeat: float, seed: int, source: int) -> NumberArray:
    """The example numbers that one source brings to an epoch, ascending, each as often as it comes.

    2.5: each twice, and a half of them, drawn by seed, a third time.
    """
    whole, part = divmod(Fraction(repr(float(repeat))), 1)
    extra = to_nearest(float(part), len(examples))
    drawn = permute(draw_seed(seed, f"repeat {source}"), 0, len(examples), np.arange(extra))
    epoch = np.concatenate([np.repeat(examples, int(whole)), examples[drawn]])
    epoch.sort()
    return epoch


def held_out(records: npt.NDArray[np.int64], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """[examples] True for the examples of the validation set: `fraction` of them, at least one.

    `records` [examples] is ascending and equal for conversations of one record: those stay together, since the branches of one
    tree share their beginnings. Raises DataError where a part on both sides is not possible.
    """
    firsts = np.flatnonzero(np.concatenate([[True], records[1:] != records[:-1]])) if len(records) else records
    if len(firsts) < 2:
        came = f"a fraction of {len(firsts)} usable records"
        raise DataError(Problem("data.validation", came, "at least 2", "Give more data, or `validation: 0`."))
    sizes = np.diff(np.append(firsts, len(records)))
    shuffled = permute(draw_seed(seed, "validation"), 0, len(sizes), np.arange(len(sizes)))
    wanted = max(1, to_nearest(fraction, len(records)))
    taken = int(np.searchsorted(np.cumsum(sizes[shuffled]), wanted)) + 1
    chosen = np.zeros(len(sizes), dtype=np.bool_)
    chosen[shuffled[: min(taken, len(sizes) - 1)]] = True
    return np.repeat(chosen, sizes)
