"""Randomness without state: each forward pass has a seed of its own, so that no generator is carried over a restart."""

import hashlib


def forward_seed(seed: int, step: int, row: int | None, place: int = 0) -> int:
    """The seed of one micro-batch's dropout, from the run's seed, the step (from 0), the micro-batch's first row, and which piece
    of its rows it is: the dropout of two pieces must not be alike.
    """
    words = f"{seed}/{step}/{'padding' if row is None else row}" + (f"/{place}" if place else "")
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "little") >> 1
