"""Randomness without state: each forward pass has a seed of its own, so that no generator is carried over a restart."""

import hashlib


def forward_seed(seed: int, step: int, row: int | None) -> int:
    """The seed of one micro-batch's dropout, from the run's seed, the step (from 0) and the micro-batch's first row."""
    words = f"{seed}/{step}/{'padding' if row is None else row}".encode()
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "little") >> 1
