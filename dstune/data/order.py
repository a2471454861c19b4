"""The order of training: which rows stand in which step, as a function of (number of rows, seed, position) alone.

Position i is row `permute(seed, i div R, R)[i mod R]` of R rows; step k takes positions kB to (k+1)B - 1 and runs on over the
ends of epochs. Nothing is stored and nothing is drawn: any process finds any step's rows from one integer.

The permutation is a Feistel network over the fewest bits that hold R (at least 6), walked until it falls below R
(Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, method 2: at most two walks a row on average). Its algorithm
is part of the contract: tests pin it by literal values, and a change of it would change every run's data order.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

_NUM_ROUNDS = 8
_LABEL = b"dstune order 1"
_MIN_BITS = 6
"""Below 64 values a Feistel network is a poor shuffle; walking a wider one costs nothing at that size."""
_FIRST_FACTOR = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_FACTOR = np.uint64(0x94D049BB133111EB)


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    """Eight 64-bit keys: SHA-256 of the label, seed, epoch and round, each as 8 bytes little-endian."""
    prefix = _LABEL + seed.to_bytes(8, "little") + epoch.to_bytes(8, "little")
    digests = (hashlib.sha256(prefix + number.to_bytes(8, "little")).digest() for number in range(_NUM_ROUNDS))
    return [np.uint64(int.from_bytes(digest[:8], "little")) for digest in digests]


def _mix(values: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """Steele, Lea and Flood's 64-bit finaliser (SplitMix64) of `values ^ key`; uint64 arithmetic wraps."""
    mixed = values ^ key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST_FACTOR
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND_FACTOR
    return mixed ^ (mixed >> np.uint64(31))


def _encrypt(values: npt.NDArray[np.uint64], keys: list[np.uint64], bits: int) -> npt.NDArray[np.uint64]:
    """A permutation of 0 .. 2**bits - 1: the two halves (of which the right may be a bit wider) take turns.

    Each turn changes one half by a function of the other alone, so it can be undone, whatever that function is.
    """
    right_bits = np.uint64(bits - bits // 2)
    left_bits = np.uint64(bits // 2)
    left = values >> right_bits
    right = values & ((np.uint64(1) << right_bits) - np.uint64(1))
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = left ^ (_mix(right, key) >> (np.uint64(64) - left_bits))
        else:
            right = right ^ (_mix(left, key) >> (np.uint64(64) - right_bits))
    return (left << right_bits) | right


def permute(seed: int, epoch: int, num_rows: int, index: npt.NDArray[Any]) -> IntArray:
    """Where the places `index` (integers below `num_rows`) of this epoch's order point: row numbers, int64, same shape.

    Over 0 .. num_rows - 1 it is a permutation. Memory is that of `index`, whatever `num_rows`.
    Raises ValueError for a place outside, a negative epoch, or a seed outside 0 .. 2**63 - 1.
    """
    if not 0 <= seed < 2**63 or epoch < 0:
        raise ValueError(f"no order for seed {seed}, epoch {epoch}")
    places = np.asarray(index)
    if places.size and (places.min() < 0 or places.max() >= num_rows):
        raise ValueError(f"a place outside 0 .. {num_rows - 1}")
    if num_rows <= 1:
        return np.zeros(places.shape, dtype=np.int64)
    keys = _round_keys(seed, epoch)
    bits = max(_MIN_BITS, (num_rows - 1).bit_length())
    limit = np.uint64(num_rows)
    walked = _encrypt(places.astype(np.uint64).reshape(-1), keys, bits)
    while (outside := np.flatnonzero(walked >= limit)).size:
        walked[outside] = _encrypt(walked[outside], keys, bits)
    return walked.astype(np.int64).reshape(places.shape)


def total_positions(num_rows: int, epochs: float | None, max_steps: int | None, batch: int) -> int:
    """How many rows a run takes: `max_steps` whole batches, or `epochs` (1 if None) times the rows, to the nearest, at least 1.

    `epochs` is taken as it was written (0.1 is a tenth), so that 30 rows for 0.1 epochs are 3 and not 4.
    """
    if num_rows < 1 or batch < 1:
        raise ValueError(f"{num_rows} rows in batches of {batch}")
    if max_steps is not None:
        return max_steps * batch
    exact = Fraction(repr(1.0 if epochs is None else float(epochs))) * num_rows
    return max(1, int(exact + Fraction(1, 2)))


def num_steps(positions: int, batch: int) -> int:
    """Steps that `positions` rows make; the last may be short."""
    return -(-positions // batch)


def rows_of_step(num_rows: int, seed: int, batch: int, positions: int, step: int) -> IntArray:
    """Row numbers of `step` (from 0) of a run over `positions` rows, in order: `batch` of them, fewer only in the last step.

    Raises IndexError for a step that the run does not have.
    """
    if not 0 <= step < num_steps(positions, batch):
        raise IndexError(f"step {step} of a run of {num_steps(positions, batch)} steps")
    here = np.arange(step * batch, min((step + 1) * batch, positions), dtype=np.int64)
    epochs, places = np.divmod(here, num_rows)
    parts = [permute(seed, int(epoch), num_rows, places[epochs == epoch]) for epoch in np.unique(epochs)]
    return np.concatenate(parts)


def share(rows: Sequence[int] | IntArray, rank: int, world_size: int, micro_batch: int) -> list[list[int | None]]:
    """The micro-batches of one worker: equal in number and length on every worker, padded by None (a row of weight zero).

    n rows go to m = the fewest micro-batches of at most `micro_batch` rows that world_size divides; of these worker r runs
    numbers r, r + world_size, r + 2 world_size, … So the cut into micro-batches depends on m alone: 1 worker with 4 of them
    and 2 workers with 2 each see the same ones. Rows are spread evenly (sizes differ by at most 1), and every micro-batch
    is padded to the largest one's length, which may be below `micro_batch`.
    Example: rows 0 .. 7, 3 workers, micro-batch 2: worker 0 has [[0, None], [4, None]], worker 2 has [[2, 3], [6, 7]].
    """
    if not 0 <= rank < world_size or micro_batch < 1:
        raise ValueError(f"rank {rank} of {world_size}, micro-batch {micro_batch}")
    values = [int(row) for row in rows]
    if not values:
        raise ValueError("no rows to share")
    num_micro_batches = num_steps(len(values), world_size * micro_batch) * world_size
    bounds = [len(values) * number // num_micro_batches for number in range(num_micro_batches + 1)]
    length = num_steps(len(values), num_micro_batches)
    result: list[list[int | None]] = []
    for number in range(rank, num_micro_batches, world_size):
        micro: list[int | None] = [*values[bounds[number] : bounds[number + 1]]]
        result.append(micro + [None] * (length - len(micro)))
    return result


def digest(example_numbers: Sequence[int] | npt.NDArray[Any]) -> str:
    """`batch_digest`: the first 16 hexadecimal digits of SHA-256 over the sorted example numbers as int32, little-endian."""
    numbers = np.sort(np.asarray(example_numbers)).astype("<i4")
    return hashlib.sha256(numbers.tobytes()).hexdigest()[:16]
