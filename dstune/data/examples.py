"""The examples of a prepared directory while it is made: written, counted, not packed yet; parted, and without their repetitions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstune.data.duplicates import Duplicates
from dstune.data.shard_writer import ShardWriter, WrittenFile
from dstune.data.shards import read_blocks
from dstune.data.tally import FileTally, Rejects

DUPLICATE = "duplicate"
NEAR_DUPLICATE = "near_duplicate"


@dataclass(frozen=True)
class Examples:
    """The examples of one directory, written but not yet packed. Arrays: [examples]."""

    tallies: Sequence[FileTally]
    shards: Sequence[WrittenFile]
    lengths: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.int32]
    files: npt.NDArray[np.int32]
    """Index of each example's tally."""
    records: npt.NDArray[np.int64]
    """Number of each example's record."""
    kept: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))
    """Those that repeat no other; all of them where nobody looked."""
    rejects: WrittenFile = field(default_factory=lambda: WrittenFile("", 0, ""))

    def __post_init__(self) -> None:
        if len(self.kept) != len(self.files):
            object.__setattr__(self, "kept", np.ones(len(self.files), dtype=np.bool_))

    def of_source(self, source: int) -> npt.NDArray[np.int32]:
        """The numbers of a source's examples, ascending."""
        return numbers_of_source([tally.source for tally in self.tallies], self.files, source)

    def described(self) -> list[dict[str, Any]]:
        """The manifest's entry of each file: what became of its records anywhere, and what of it stands in this directory."""
        num = len(self.tallies)
        stored = [
            np.bincount(self.files, weights, num).astype(np.int64).tolist()
            for weights in (None, self.lengths, self.supervised)
        ]
        return [tally.to_dict(*here) for tally, *here in zip(self.tallies, *stored, strict=True)]

    def part(self, chosen: npt.NDArray[np.bool_], writer: ShardWriter, rejects: WrittenFile) -> "Examples":
        """Those of them that were written again by `writer`."""
        shards = writer.finish()
        records = self.records[chosen]
        found = (writer.lengths(), writer.supervised(), writer.files(), records)
        return Examples(self.tallies, shards, *found, rejects=rejects)


def numbers_of_source(
    source_of_file: Sequence[int], files: npt.NDArray[np.int32], source: int
) -> npt.NDArray[np.int32]:
    """The numbers of the examples whose file [examples] belongs to `source`, ascending."""
    return np.flatnonzero(np.equal(source_of_file, source)[files]).astype(np.int32)


def share_out(
    stage: Path, shards: Sequence[WrittenFile], writers: Sequence[tuple[ShardWriter, npt.NDArray[np.bool_]]]
) -> None:
    """Write the examples of `stage` again, each to the writer whose mask [examples] has it, and delete the stage."""
    first = 0
    for shard in shards:
        for block in read_blocks(stage / shard.name):
            last = first + block.num_examples
            for writer, chosen in writers:
                writer.add(block.take(chosen[first:last]))
            first = last
        (stage / shard.name).unlink()
    stage.rmdir()


def drop_duplicates(found: Duplicates, examples: "Examples", shards: Path, rejects: Rejects) -> None:
    """Count and list the repetitions: each with what it repeats."""
    dropped = np.flatnonzero(~found.kept)
    named = np.union1d(dropped, found.of[dropped])
    lines, parts = _places(named, examples, shards)
    for number in dropped.tolist():
        of, similarity = int(found.of[number]), float(found.similarity[number])
        tally, other = examples.tallies[int(examples.files[number])], examples.tallies[int(examples.files[of])]
        reason = DUPLICATE if similarity >= 1 else NEAR_DUPLICATE
        tally.dropped[reason] += 1
        tally.kept -= 1
        here, there = np.searchsorted(named, (number, of)).tolist()
        where = f"{other.path}:{lines[there]}" + (f" part {parts[there]}" if parts[there] else "")
        detail = f"repeats {where}" + ("" if similarity >= 1 else f", {similarity:.2f} alike")
        rejects.add(tally.path, int(lines[here]), int(parts[here]), reason, detail)


def _places(
    numbers: npt.NDArray[np.int64], examples: "Examples", shards: Path
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Line and part of some examples; `numbers` ascending."""
    lines, parts = np.zeros(len(numbers), np.int64), np.zeros(len(numbers), np.int32)
    first = 0
    for block in (block for shard in examples.shards for block in read_blocks(shards / shard.name)):
        low, high = np.searchsorted(numbers, (first, first + block.num_examples)).tolist()
        here = numbers[low:high] - first
        lines[low:high], parts[low:high] = block.lines[here], block.parts[here]
        first += block.num_examples
    return lines, parts
