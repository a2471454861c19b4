"""Several tokenised conversations as arrays: what travels between processes and goes into the shards."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Block:
    """Examples end to end."""

    ids: npt.NDArray[np.int32]
    """[tokens]"""
    mask: npt.NDArray[np.bool_]
    """[tokens] True = a target."""
    lengths: npt.NDArray[np.int32]
    """[examples] tokens of each."""
    files: npt.NDArray[np.int32]
    """[examples] index into the manifest's sources; like `lines` and `parts` says where an example comes from."""
    lines: npt.NDArray[np.int64]
    parts: npt.NDArray[np.int32]

    @property
    def num_examples(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def supervised(self) -> npt.NDArray[np.int32]:
        """[examples] targets of each."""
        before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self.mask)])
        ends = np.cumsum(self.lengths, dtype=np.int64)
        return (before[ends] - before[ends - self.lengths]).astype(np.int32)

    def take(self, chosen: npt.NDArray[np.bool_]) -> "Block":
        """The examples that `chosen` [examples] says."""
        tokens = np.repeat(chosen, self.lengths)
        places = (self.lengths[chosen], self.files[chosen], self.lines[chosen], self.parts[chosen])
        return Block(self.ids[tokens], self.mask[tokens], *places)

    @classmethod
    def joined(cls, blocks: Sequence["Block"]) -> "Block":
        """One block after the other. `blocks` is not empty."""
        if len(blocks) == 1:
            return blocks[0]
        columns: list[Any] = [np.concatenate([getattr(block, field.name) for block in blocks]) for field in fields(cls)]
        return cls(*columns)


def block_of(
    ids: Sequence[npt.NDArray[np.int32]],
    masks: Sequence[npt.NDArray[np.bool_]],
    file: int,
    lines: Sequence[int],
    parts: Sequence[int],
) -> Block:
    """The block of one file's examples, given one by one."""
    lengths = np.array([len(one) for one in ids], dtype=np.int32)
    return Block(
        np.concatenate([np.zeros(0, dtype=np.int32), *ids]),
        np.concatenate([np.zeros(0, dtype=np.bool_), *masks]),
        lengths,
        np.full(len(lengths), file, dtype=np.int32),
        np.array(lines, dtype=np.int64),
        np.array(parts, dtype=np.int32),
    )
