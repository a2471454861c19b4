"""What the preparing processes send back, counted and stored, or refused as the run file says."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dstune.config.schema import DataSection
from dstune.data.column import Column
from dstune.data.duplicates import Digests
from dstune.data.shard_writer import ShardWriter, StoredArray
from dstune.data.tally import FileTally, Rejects
from dstune.data.work import NO_TARGETS, OVERLONG, Drop, Result
from dstune.errors import DataError, Problem

LOSSY = "lossy_text"
CONTROL = "control_tokens"
_NOTHING_TO_LEARN = (OVERLONG, NO_TARGETS, "empty_answer", "contaminated")
"""Reasons that are no fault of the record: dropped and listed, whatever `bad_rows` says."""
_CLEANING = "clean_"
OVERLONG_LIMIT = 0.01
"""Of a source's conversations; above it, `overlong: error` refuses."""
_SHOWN = 20
"""Problems that are told at once; the rest of the chunk's are counted."""
_DETAIL_CHARACTERS = 400


class Collector:
    """Takes results in the order of the files: tallies, rejects, examples. Raises DataError as `bad_rows` and its kin say."""

    def __init__(self, data: DataSection, tallies: Sequence[FileTally], writer: ShardWriter, rejects: Rejects) -> None:
        self._data = data
        self._tallies = tallies
        self._writer = writer
        self._rejects = rejects
        self._records = Column(np.int64)
        self._digests = Column(np.uint64)
        self._place = (-1, -1)
        self._next_part = 0
        self._problems: list[Problem] = []
        self._current = -1
        self.num_records = 0
        """Records taken so far."""
        self.num_examples = 0

    def records(self) -> npt.NDArray[np.int64]:
        """[examples] number of the record that each example comes from, ascending."""
        return self._records.values()

    def digests(self) -> Digests:
        """[examples, 2] what exact repetitions have in common; empty where they are not looked for."""
        return self._digests.values().reshape(-1, 2)

    def take(self, result: Result, signatures: StoredArray | None = None) -> None:
        """Count and store one chunk's records. Raises DataError naming every bad one of the chunk."""
        tally = self._tallies[result.file]
        if tally.source != self._current:
            self.end_source()
            self._current = tally.source
        first_line, before = self._parts_before(result)
        block = result.block
        if before:
            block.parts[block.lines == first_line] += before
        tally.add(result.tally)
        for drop in result.drops:
            self._refuse(drop, tally, before if drop.line == first_line else 0)
        if self._problems:
            more = len(self._problems) - _SHOWN
            end = [Problem("", f"… and {more} more up to line {result.last_line}")] if more > 0 else []
            raise DataError(self._problems[:_SHOWN] + end)
        self._writer.add(block)
        self._records.add(result.records + self.num_records)
        if result.digests is not None:
            self._digests.add(result.digests.reshape(-1))
        if signatures is not None and result.signatures is not None:
            signatures.add(result.signatures)
        self.num_records += result.num_records
        self.num_examples += block.num_examples

    def end_source(self) -> None:
        """Refuse a source too many of whose conversations are too long, if the run file leaves it to us."""
        tallies = [tally for tally in self._tallies if tally.source == self._current]
        made = sum(tally.made for tally in tallies)
        long = sum(tally.dropped[OVERLONG] for tally in tallies)
        if self._data.overlong != "error" or long <= OVERLONG_LIMIT * made:
            return
        longest = max(tally.longest for tally in tallies)
        came = f"{long} of {made} conversations have more than max_length = {self._data.max_length} tokens (up to {longest})"
        do = "Raise `data.max_length`, or choose `data.overlong: drop` (listed in rejects.jsonl), `truncate`, or `split` (documents)."
        where = ", ".join(tally.path for tally in tallies[:3]) + (", …" if len(tallies) > 3 else "")
        raise DataError(Problem(where, came, f"at most {OVERLONG_LIMIT:.0%}", do))

    def _parts_before(self, result: Result) -> tuple[int, int]:
        """The chunk's first line, and how many parts earlier chunks made on it: records of an array may share one line."""
        lines = [*result.block.lines[:1].tolist(), *(drop.line for drop in result.drops[:1])]
        first = min(lines, default=-1)
        before = self._next_part if self._place == (result.file, first) else 0
        self._place = (result.file, result.last_line)
        self._next_part = result.last_parts + (before if first == result.last_line else 0)
        return first, before

    def _refuse(self, drop: Drop, tally: FileTally, before: int) -> None:
        reason, detail = drop.refused.reason, drop.refused.detail[:_DETAIL_CHARACTERS]
        part = drop.part + before if drop.part is not None else before or None
        self._rejects.add(tally.path, drop.line, part, reason, detail)
        if do := self._stops(reason):
            where = f"{tally.path}:{drop.line}" + (f" part {part}" if part else "")
            self._problems.append(Problem(where, f"{reason}: {detail}" if detail else reason, do=do))

    def _stops(self, reason: str) -> str:
        """What to do about a reason that ends the preparation; empty where it is only listed."""
        if reason in _NOTHING_TO_LEARN or reason.startswith(_CLEANING):
            return ""
        if reason == LOSSY:
            if self._data.lossy_text != "error":
                return ""
            return "Take a tokenizer that has these characters, or `data.lossy_text: skip` (drop, listed) or `allow` (count)."
        if self._data.bad_rows == "skip":
            return ""
        if reason == CONTROL:
            return (
                "Correct the record, or `data.control_tokens: encode`, or `data.bad_rows: skip` to drop such records."
            )
        return "Correct the record, or set `data.bad_rows: skip`: it is then listed in rejects.jsonl and left out."
