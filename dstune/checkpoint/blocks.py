"""Hashes of a file's blocks, beside the SHA-256 of the whole: a part is checked by itself, by several threads, while it is read.

They are xxh3's 64 bits, which find what disks, memory and copies do to bytes at eight times SHA-256's speed. Neither hash
keeps a forger out: the manifest that holds them is signed by nobody.
"""

from collections.abc import Iterator

import xxhash

from dstune.checkpoint.layout import HASH_DIGITS, MIN_BLOCK_BYTES, FileRecord

_MAX_BLOCKS = 4096
"""Of a file: what keeps manifests small. Slices grow with the files, and so may blocks."""


def block_bytes_for(num_bytes: int) -> int:
    """The length of blocks for a file of `num_bytes`: a power of two, 256 KiB up to 1 GiB, twice that up to 2 GiB, …"""
    size = MIN_BLOCK_BYTES
    while size * _MAX_BLOCKS < num_bytes:
        size *= 2
    return size


class BlockHasher:
    """Hashes blocks of `block_bytes` of what comes in order."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = self._left = block_bytes
        self._digest = xxhash.xxh3_64()
        self._hashes: list[str] = []

    def update(self, memory: memoryview) -> None:
        while memory:
            part = memory[: self._left]
            self._digest.update(part)
            self._left -= len(part)
            memory = memory[len(part) :]
            if self._left == 0:
                self._end_block()

    def finish(self) -> str:
        """The hashes in hexadecimal, one behind the other; the last block may be a short one."""
        if self._left < self._block_bytes:
            self._end_block()
        return "".join(self._hashes)

    def _end_block(self) -> None:
        self._hashes.append(self._digest.hexdigest())
        self._digest.reset()
        self._left = self._block_bytes


class Blocks:
    """A file's blocks as they were written. The record must have them."""

    def __init__(self, record: FileRecord) -> None:
        assert record.block_bytes > 0
        self.block_bytes = record.block_bytes
        self._num_bytes, self._hashes = record.bytes, record.block_hashes

    def around(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Where each block begins and ends that holds some of the bytes `first` up to `last`."""
        if first < last:
            for begin in range(first - first % self.block_bytes, last, self.block_bytes):
                yield begin, min(begin + self.block_bytes, self._num_bytes)

    def is_whole(self, begin: int, memory: memoryview) -> bool:
        """Whether `memory` holds what was written as the block that begins at `begin`."""
        return self._hash(begin) == xxhash.xxh3_64_hexdigest(memory)

    def changed(self, begin: int, hashes: str) -> list[tuple[int, int]]:
        """Which blocks have other hashes than these, which are of the blocks from `begin` on: where each begins and ends."""
        end = begin + len(hashes) // HASH_DIGITS * self.block_bytes
        found = [hashes[at : at + HASH_DIGITS] for at in range(0, len(hashes), HASH_DIGITS)]
        return [span for span, one in zip(self.around(begin, end), found, strict=True) if one != self._hash(span[0])]

    def _hash(self, begin: int) -> str:
        at = begin // self.block_bytes * HASH_DIGITS
        return self._hashes[at : at + HASH_DIGITS]
