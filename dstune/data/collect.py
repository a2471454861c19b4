"""What the preparing processes send back, counted and stored, or refused as the run file says."""

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from dstune.config.schema import DataSection
from dstune.data.conversation import Refused
from dstune.data.shard_writer import ShardWriter
from dstune.data.shards import StoredExample
from dstune.data.tally import FileTally, Rejects
from dstune.data.work import NO_TARGETS, OVERLONG, Done, Part, Result
from dstune.errors import DataError, Problem

LOSSY = "lossy_text"
CONTROL = "control_tokens"
_NOTHING_TO_LEARN = (OVERLONG, NO_TARGETS, "empty_answer")
"""Reasons that are no fault of the record: dropped and listed, whatever `bad_rows` says."""
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
        self._files = array("i")
        self._records = array("q")
        self._place = (-1, -1)
        self._next_part = 0
        self._problems: list[Problem] = []
        self._current = -1
        self.num_records = 0
        """Records taken so far."""

    @property
    def files(self) -> np.ndarray[Any, np.dtype[np.int32]]:
        """[examples] index of the tally that each example belongs to."""
        return np.array(self._files, dtype=np.int32)

    @property
    def records(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[examples] number of the record that each example comes from, ascending."""
        return np.array(self._records, dtype=np.int64)

    @property
    def num_examples(self) -> int:
        return len(self._records)

    def take(self, result: Result) -> None:
        """Count and store one chunk's records. Raises DataError naming every bad one of the chunk."""
        tally = self._tallies[result.file]
        if tally.source != self._current:
            self.end_source()
            self._current = tally.source
        for record in result.records:
            self._take_record(record, tally, result.file)
            self.num_records += 1
        if self._problems:
            more = len(self._problems) - _SHOWN
            end = [Problem("", f"… and {more} more up to line {result.records[-1].line}")] if more > 0 else []
            raise DataError(self._problems[:_SHOWN] + end)

    def end_source(self) -> None:
        """Refuse a source too many of whose conversations are too long, if the run file leaves it to us."""
        tallies = [tally for tally in self._tallies if tally.source == self._current]
        made = sum(tally.made for tally in tallies)
        long = sum(tally.dropped[OVERLONG] for tally in tallies)
        if self._data.overlong != "error" or long <= OVERLONG_LIMIT * made:
            return
        longest = max(tally.longest for tally in tallies)
        came = f"{long} of {made} conversations have more than max_length = {self._data.max_length} tokens (up to {longest})"
        do = "Raise `data.max_length`, or choose `data.overlong: drop` (listed in rejects.jsonl) or `truncate`."
        where = ", ".join(tally.path for tally in tallies[:3]) + (", …" if len(tallies) > 3 else "")
        raise DataError(Problem(where, came, f"at most {OVERLONG_LIMIT:.0%}", do))

    def _take_record(self, record: Done, tally: FileTally, file: int) -> None:
        first = self._first_part((file, record.line), len(record.parts))
        if record.refused is not None:
            tally.records_dropped[record.refused.reason] += 1
            self._refuse(record.refused, tally, record.line, first or None)
            return
        tally.records_used += 1
        for number, part in enumerate(record.parts, first):
            tally.longest = max(tally.longest, part.length)
            if part.refused is not None:
                tally.dropped[part.refused.reason] += 1
                self._refuse(part.refused, tally, record.line, number)
            else:
                self._keep(part, tally, file, record.line, number)

    def _first_part(self, place: tuple[int, int], count: int) -> int:
        """The number of a record's first part: where records share a line (an array written on one), parts count on."""
        first = self._next_part if place == self._place else 0
        self._place, self._next_part = place, first + max(1, count)
        return first

    def _keep(self, part: Part, tally: FileTally, file: int, line: int, number: int) -> None:
        example = part.example
        assert example is not None and example.loss_mask.any(), "an example without a target was kept"
        tally.kept += 1
        tally.truncated += part.length > len(example.input_ids)
        tally.tokens += len(example.input_ids)
        tally.supervised_tokens += int(example.loss_mask.sum())
        tally.control_tokens_encoded += example.control_tokens_encoded
        tally.examples_with_control_tokens += example.control_tokens_encoded > 0
        tally.lossy_characters += example.lossy_characters
        tally.lossy_examples += example.lossy_characters > 0
        self._writer.add(StoredExample(example.input_ids, example.loss_mask, file, line, number))
        self._files.append(file)
        self._records.append(self.num_records)

    def _refuse(self, refused: Refused, tally: FileTally, line: int, part: int | None) -> None:
        detail = refused.detail[:_DETAIL_CHARACTERS]
        self._rejects.add(tally.path, line, part, refused.reason, detail)
        if do := self._stops(refused.reason):
            where = f"{tally.path}:{line}" + (f" part {part}" if part else "")
            self._problems.append(Problem(where, f"{refused.reason}: {detail}" if detail else refused.reason, do=do))

    def _stops(self, reason: str) -> str:
        """What to do about a reason that ends the preparation; empty where it is only listed."""
        if reason in _NOTHING_TO_LEARN:
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
