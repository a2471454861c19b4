"""Conversations that share long runs of words with evaluation files: what a model must not have seen before it is examined.

The way of GPT-3 (Brown et al. 2020, appendix C): runs of 13 words, in lower case and without punctuation. Where most of a run is
written without blanks (Chinese, …) it is of characters, and twice as long. Of evaluation texts that are shorter than a run all
is compared, if that is at least 8 words, or 16 characters.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dstune.config.schema import DecontaminateSection, Source
from dstune.data.conversation import Conversation, Refused
from dstune.data.sources import SourceFile, digest, expand, read
from dstune.data.words import HashArray, Words, ngrams, words
from dstune.errors import DataError, Problem

SHORTEST = 8
"""An evaluation text of fewer words says nothing about where it came from: it is not looked for."""
TELLING_CHARACTERS = 3
"""A run whose words have fewer on average is made of numbers and variables: too many texts share it."""
FORM_RECORDS, FORM_SHARE = 10, 0.05
"""A run of words in more records of a file than both is the evaluation's form (its instructions), not its content."""
_EXCERPT_CHARACTERS = 200


@dataclass(frozen=True)
class _Runs:
    """Hashed runs of words of one length, ascending."""

    hashes: HashArray
    """[runs]"""
    records: npt.NDArray[np.int32]
    """[runs] The number of the first record that has each."""

    @cached_property
    def _sieve(self) -> npt.NDArray[np.bool_]:
        """[a power of two] Whether any hash begins with these bits: most words need no search."""
        bits = min(max(len(self.hashes).bit_length() + 3, 10), 26)
        sieve = np.zeros(1 << bits, np.bool_)
        sieve[self.hashes >> np.uint64(64 - bits)] = True
        return sieve

    def find(self, hashes: HashArray) -> list[int]:
        """Which of `hashes` are among these runs: their places, ascending."""
        shift = np.uint64(65 - len(self._sieve).bit_length())
        likely = np.flatnonzero(self._sieve[hashes >> shift])
        at = np.minimum(np.searchsorted(self.hashes, hashes[likely]), len(self.hashes) - 1)
        return likely[self.hashes[at] == hashes[likely]].tolist()

    def record_of(self, found: np.uint64) -> int:
        """The first record that has a run of these."""
        return int(self.records[np.searchsorted(self.hashes, found)])


@dataclass(frozen=True)
class _File:
    name: str
    """As the run file names it."""
    sha256: str
    records: int
    unchecked: int
    """Records without any text that is long enough to be looked for."""


@dataclass(frozen=True)
class Contamination:
    """The runs of words of the evaluation files; picklable, 12 bytes for each distinct run. Made by `build`."""

    files: tuple[_File, ...]
    runs: dict[int, _Runs]
    """By length in words: the section's `ngram`, twice that for characters, and the lengths of shorter texts."""
    places: npt.NDArray[np.int64]
    """[records, 2] The number of the file and the line of each."""

    @classmethod
    def build(cls, section: DecontaminateSection, base: Path, max_record_bytes: int) -> "Contamination":
        """Reads every evaluation file. Raises ConfigError where one is missing, DataError for a record that cannot be read.

        All texts of a record count, whatever its form; with `columns`, the named ones alone, and of a Natural Instructions task
        its instances: the definition is what training and evaluation share on purpose.
        """
        sources = [Source(path=one) if isinstance(one, str) else one for one in section.against]
        try:
            found = [_read(source, base, max_record_bytes, section.ngram) for source in sources]
        except OSError as error:
            where = str(error.filename or "data.decontaminate")
            raise DataError(Problem(where, f"cannot be read: {error.strerror or error}")) from None
        read_files = [one for files in found for one in files]
        places = [(number, line) for number, (_, lines, _) in enumerate(read_files) for line in lines]
        offsets = np.cumsum([0, *(len(lines) for _, lines, _ in read_files)])
        lengths = sorted({length for _, _, runs in read_files for length in runs})
        merged = {
            length: _merged(
                (runs[length].hashes, runs[length].records + offset)
                for (_, _, runs), offset in zip(read_files, offsets, strict=False)
                if length in runs
            )
            for length in lengths
        }
        merged = {length: runs for length, runs in merged.items() if len(runs.hashes)}
        return cls(tuple(file for file, _, _ in read_files), merged, np.array(places, np.int64).reshape(-1, 2))

    def check(self, conversation: Conversation) -> Refused | None:
        """Why `conversation` must not be trained on (reason `contaminated`), or None. Tools that it is offered do not count."""
        return self.check_all([conversation])[0]

    def check_all(self, conversations: Sequence[Conversation]) -> list[Refused | None]:
        """`check` of each: a chunk at once takes a fraction of the time."""
        said = words(["\n".join(_said(one)) for one in conversations])
        refused: list[Refused | None] = [None] * len(conversations)
        for length, runs in self.runs.items():
            hashes = ngrams(said.hashes, length)
            for word in runs.find(hashes):
                text = said.text_of(word)
                if refused[text] is None and word + length <= said.offsets[text + 1]:
                    excerpt = " ".join(said.between(word, length).split())[:_EXCERPT_CHARACTERS]
                    file, line = self.places[runs.record_of(hashes[word])]
                    refused[text] = Refused("contaminated", f"shares {excerpt!r} with {self.files[file].name}:{line}")
        return refused

    def described(self) -> list[dict[str, Any]]:
        """For the manifest: each evaluation file, the hash of its bytes, its records, and those too short to be looked for."""
        return [
            {"path": file.name, "sha256": file.sha256, "records": file.records, "unchecked": file.unchecked}
            for file in self.files
        ]


def _said(conversation: Conversation) -> Iterator[str]:
    for message in conversation.messages:
        yield message.content
        if message.reasoning:
            yield message.reasoning
        yield from _texts(message.tool_calls)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


_ReadFile = tuple[_File, list[int], dict[int, _Runs]]
"""A file, the lines of its records, and its runs by length with the records' numbers in it."""


def _read(source: Source, base: Path, max_record_bytes: int, ngram: int) -> list[_ReadFile]:
    left = source.limit
    read_files: list[_ReadFile] = []
    for file in expand(source, base, max_record_bytes):
        one = _read_file(file, ngram, left)
        left = None if left is None else left - one[0].records
        read_files.append(one)
    return read_files


def _read_file(file: SourceFile, ngram: int, limit: int | None) -> _ReadFile:
    lines: list[int] = []
    unchecked = 0
    found: dict[int, list[tuple[HashArray, npt.NDArray[np.int32]]]] = {}
    for number, record in enumerate(itertools.islice(read(file), limit)):
        if record.value is None:
            came = str(record.error or "an unreadable record")
            raise DataError(Problem(f"{file.name}:{record.line}", came, "a whole evaluation file", "repair it"))
        lines.append(record.line)
        of_record = _runs_of(record.value, file.source, ngram)
        unchecked += not of_record
        for length, hashes in of_record.items():
            found.setdefault(length, []).append((hashes, np.full(len(hashes), number, np.int32)))
    form = max(FORM_RECORDS, FORM_SHARE * len(lines))
    runs = {length: _merged(parts, form) for length, parts in found.items()}
    return _File(file.name, "" if file.is_builtin else digest(file), len(lines), unchecked), lines, runs


def _runs_of(value: dict[str, Any], source: Source, ngram: int) -> dict[int, HashArray]:
    """The distinct runs of one record, by length."""
    runs: dict[int, list[HashArray]] = {}
    for text in _texts(_contents(value, source)):
        for length, hashes in _runs_of_text(words([text]), ngram):
            if len(hashes):
                runs.setdefault(length, []).append(hashes)
    return {length: np.unique(np.concatenate(parts)) for length, parts in runs.items()}


def _contents(value: dict[str, Any], source: Source) -> Any:
    """What of a record is looked at: the named columns, of a Natural Instructions task its instances, else all."""
    if source.columns:
        return [value.get(theirs) for theirs in source.columns.values()]
    return value["Instances"] if {"Definition", "Instances"} <= value.keys() else value


def _runs_of_text(found: Words, ngram: int) -> Iterator[tuple[int, HashArray]]:
    """The runs that say where they came from: of words, and of twice as many characters."""
    count = len(found.hashes)
    factor = 2 if found.alone.sum() * 2 > count else 1
    if count < factor * ngram:
        if count >= factor * min(SHORTEST, ngram):
            yield count, ngrams(found.hashes, count)[_telling(found, count, factor == 2)]
        return
    for length, alone in ((ngram, False), (2 * ngram, True)):
        if count >= length:
            yield length, ngrams(found.hashes, length)[_telling(found, length, alone)]


def _telling(found: Words, length: int, alone: bool) -> npt.NDArray[np.bool_]:
    """[runs] Whether most of it is (`alone`) or is not characters by themselves, and its words are no mere signs."""
    mostly_alone = _sums(found.alone, length) * 2 > length
    if alone:
        return mostly_alone
    return ~mostly_alone & (_sums(found.ends - found.starts, length) >= TELLING_CHARACTERS * length)


def _sums(values: npt.NDArray[Any], length: int) -> npt.NDArray[np.int64]:
    """[values - length + 1] The sum of each run."""
    total = np.concatenate([[0], np.cumsum(values)])
    return total[length:] - total[:-length]


def _merged(parts: Iterable[tuple[HashArray, npt.NDArray[np.int32]]], most_records: float = np.inf) -> _Runs:
    """Each distinct run with its first record, without those of more than `most_records` records."""
    listed = list(parts)
    hashes = np.concatenate([hashes for hashes, _ in listed])
    records = np.concatenate([records for _, records in listed])
    order = np.argsort(hashes, kind="stable")
    distinct, first, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    few = counts <= most_records
    return _Runs(distinct[few], records[order][first][few].astype(np.int32))
