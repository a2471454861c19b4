"""Repeated conversations: the same text but for case and blanks, or nearly the same by MinHash (Broder 1997).

`sketch` runs where the conversations are; `find_duplicates` sees the sketches of all of them, in the user's order.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import rensa

from dstune.config.schema import DeduplicateSection
from dstune.data.conversation import Conversation, Message
from dstune.data.words import HashArray, words

NUM_PERMUTATIONS = 128
"""Of the whole text: the first columns of a signature."""
PART_PERMUTATIONS = 16
"""Of what is asked, and where conversations and not prompts are compared of the answers: the columns behind them."""
_SEED = 20_240_229
_BAND_BASE = np.uint64(0xD1342543DE82EF95)
_ROWS_AT_ONCE = 1 << 14
_MISSED = 0.01
"""The bands are so narrow that two conversations as alike as the threshold are missed less often than this."""
_SENTENCE_ENDS = re.compile("[.!。！\n]")
_LEADERS = 64
"""In a bucket of conversations that are all unlike each other, so many are compared with all the others."""

Signatures = npt.NDArray[np.uint32]
Digests = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sketch:
    """What is compared of one conversation; picklable, 0.7 KiB."""

    exact: bytes
    """16 bytes: a hash of the text in lower case and with single blanks."""
    signature: Signatures | None
    """[160, or 144 for prompts] MinHash of the word n-grams; None where only exact repetitions count."""


@dataclass(frozen=True)
class Duplicates:
    """What stays, and why the rest does not."""

    kept: npt.NDArray[np.bool_]
    """[examples]"""
    of: IntArray
    """[examples] The earlier, kept example that each dropped one repeats; -1 for kept ones."""
    similarity: npt.NDArray[np.float32]
    """[examples] To that example: 1 for exact repetitions and those alone, else the estimate; 0 for kept ones."""


def sketch(conversation: Conversation, settings: DeduplicateSection) -> Sketch:
    """What `find_duplicates` compares of `conversation`.

    `by: conversation` takes every turn with its role, reasoning and tool calls; `by: prompt` the system's and the user's alone.
    Whether conversations are nearly the same does not depend on the system text: a source often has one of its own, and a long
    one would decide alone.
    Conversations that are offered different tools are never alike. Where nobody asks (a document), all is compared.
    """
    return sketches([conversation], settings)[0]


def sketches(conversations: Sequence[Conversation], settings: DeduplicateSection) -> list[Sketch]:
    """`sketch` of each: a chunk at once takes a fraction of the time."""
    turns = [_compared(one, settings.by) for one in conversations]
    tools = [sorted(map(_canonical, one.tools)) for one in conversations]
    exact = [_digest([*map(_normal, said), "tools", *of], 16) for said, of in zip(turns, tools, strict=True)]
    if settings.method == "exact":
        return [Sketch(one, None) for one in exact]
    whole = [_text(_beside_system(said) if settings.by == "conversation" else said) for said in turns]
    parts = [_signatures(whole, tools, settings.ngram, NUM_PERMUTATIONS)]
    parts.append(_signatures([_asked(said) for said in turns], tools, 1, PART_PERMUTATIONS))
    if settings.by == "conversation":
        replies = [_text(turn for turn in said if turn.role == "assistant") for said in turns]
        parts.append(_signatures(replies, tools, settings.ngram, PART_PERMUTATIONS))
    return [Sketch(one, signature) for one, signature in zip(exact, np.concatenate(parts, axis=1), strict=True)]


def _compared(conversation: Conversation, by: str) -> list[Message]:
    asked = [turn for turn in conversation.messages if by == "conversation" or turn.role in ("system", "user")]
    return asked or list(conversation.messages)


def _beside_system(turns: list[Message]) -> list[Message]:
    return [turn for turn in turns if turn.role != "system"] or turns


def _normal(turn: Message) -> str:
    return f"{turn.role}\0{' '.join(_said(turn).lower().split())}"


def _said(turn: Message) -> str:
    if not turn.tool_calls and not turn.reasoning:
        return turn.content
    calls = [_canonical(call.get("function", call)) for call in turn.tool_calls]
    return "\n".join(part for part in (turn.content, turn.reasoning, *calls) if part)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _text(turns: Iterable[Message]) -> str:
    return "\n".join(map(_said, turns))


def _asked(turns: Iterable[Message]) -> str:
    """The user's sentences with a question mark, of a user who has none all: what differs where a long passage is the same."""
    text = _text(turn for turn in turns if turn.role == "user")
    return "\n".join(part for part in _SENTENCE_ENDS.split(text) if "?" in part or "？" in part) or text


def _digest(texts: Iterable[str], size: int) -> bytes:
    return hashlib.blake2b("\0\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=size).digest()


def _signatures(texts: Sequence[str], tools: Sequence[list[str]], n: int, permutations: int) -> Signatures:
    """[texts, permutations] MinHash of the runs of `n` words; of a shorter text all its words are one run, and a text
    without words is a run of its own."""
    found = words(texts)
    counts = np.diff(found.run_offsets(n))
    wholes = found.wholes()
    for number, length in enumerate(np.diff(found.offsets)):
        if not length:
            wholes[number] = int.from_bytes(_digest([texts[number]], 8), "little")
    shingles = np.insert(found.runs(n), found.run_offsets(n)[:-1][counts == 0], wholes[counts == 0])
    counts = np.maximum(counts, 1)
    apart = np.array([int.from_bytes(_digest(of, 8), "little") if of else 0 for of in tools], np.uint64)
    shingles ^= np.repeat(apart, counts)
    made = rensa.RMinHash.digest_matrix_from_flat_token_hashes  # pyright: ignore[reportAttributeAccessIssue]
    matrix = made(shingles, np.concatenate([[0], np.cumsum(counts)]), permutations, _SEED)
    return np.array(matrix.to_rows(), np.uint32)


def as_digests(exact: bytes) -> Digests:
    """[n, 2] The 16-byte hashes of n sketches, one after another, as `find_duplicates` takes them."""
    return np.frombuffer(exact, "<u8").reshape(-1, 2)


def find_duplicates(exact: Digests, signatures: Signatures | None, settings: DeduplicateSection) -> Duplicates:
    """Of each group of alike examples the first stays; `exact` [n, 2] and `signatures` [n, 144 or 160] are in the user's order.

    Exact repetitions are found with certainty. Every other dropped example is, as estimated, at least `threshold` alike to the
    kept one that it names, and both what is asked and the answers are at least half as alike as that: two questions on one long
    passage, or below one long system text, are no duplicates. The estimate of a Jaccard similarity J from k permutations has the
    standard error sqrt(J (1 - J) / k): 0.035 at 0.8 from 128. Candidates share a band of their signatures (Leskovec, Rajaraman,
    Ullman, "Mining of Massive Datasets", 3.4): a pair at the threshold is missed in at most 1 of 100 cases, a more alike one less
    often.

    Holds about 60 bytes per example beside its arguments, and `signatures` may be mapped from a file.
    """
    of = _exact(exact)
    if signatures is None or settings.method == "exact":
        return Duplicates(of < 0, of, (of >= 0).astype(np.float32))
    return _Near(signatures, settings.threshold).find(of)


def _exact(digests: Digests) -> IntArray:
    """[n] The first example with the same digest; -1 for that one."""
    of = np.full(len(digests), -1, np.int64)
    members = _shared_firsts(digests[:, 0])
    if len(members):
        found = digests[members]
        order = np.lexsort((found[:, 1], found[:, 0]))
        new = np.ones(len(members), np.bool_)
        new[1:] = (found[order][1:] != found[order][:-1]).any(1)
        leaders = order[new][np.cumsum(new) - 1]
        of[members[order]] = np.where(leaders == order, -1, members[leaders])
    return of


def _shared_firsts(column: HashArray) -> IntArray:
    """The examples, ascending, whose value in `column` another one has too: what is looked at closely, and seldom many."""
    ordered = np.sort(column)
    shared = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(shared):
        return np.zeros(0, np.int64)
    found: list[IntArray] = []
    for at in range(0, len(column), _ROWS_AT_ONCE):
        values = column[at : at + _ROWS_AT_ONCE]
        places = np.minimum(np.searchsorted(shared, values), len(shared) - 1)
        found.append(np.flatnonzero(shared[places] == values) + at)
    return np.concatenate(found)


class _Near:
    """Drops what is like something earlier that stays."""

    def __init__(self, signatures: Signatures, threshold: float) -> None:
        self._signatures, self._threshold = signatures, threshold
        self._rows = rows_per_band(NUM_PERMUTATIONS, threshold)

    def find(self, of: IntArray) -> Duplicates:
        """Passes over what is left until no example is dropped for one that is dropped itself, for the sake of something unlike.

        It ends: an example depends on earlier ones alone, so the first that is not settled is settled by a pass.
        """
        first_equal = of.copy()
        exact = of >= 0
        while True:
            self._over_bands(of, np.flatnonzero(of < 0))
            dropped = np.flatnonzero((of >= 0) & ~exact)
            roots = _roots(of, dropped)
            alike = self._alike(dropped, roots)
            of[dropped] = np.where(alike, roots, -1)
            if alike.all():
                break
        dropped = np.flatnonzero(of >= 0)
        of[dropped] = _roots(of, dropped)
        similarity = np.zeros(len(of), np.float32)
        estimates = np.minimum(self._similarities(dropped, of[dropped]), 1 - 0.5 / NUM_PERMUTATIONS)
        similarity[dropped] = np.where(of[dropped] == first_equal[dropped], 1, estimates)
        return Duplicates(of < 0, of, similarity)

    def _over_bands(self, of: IntArray, left: IntArray) -> None:
        """Marks in `of` what is like the first of a bucket, or like the first of those that are unlike it, and so on."""
        for start in range(0, NUM_PERMUTATIONS - self._rows + 1, self._rows):
            left = left[of[left] < 0]
            members, buckets = _shared(left, self._bands(left, start))
            for _ in range(_LEADERS):
                if not len(members):
                    break
                first = np.ones(len(members), np.bool_)
                first[1:] = buckets[1:] != buckets[:-1]
                leaders = members[first][np.cumsum(first) - 1]
                alike = ~first
                alike[alike] = self._alike(members[~first], leaders[~first])
                of[members[alike]] = leaders[alike]
                members, buckets = _crowded(members[~(first | alike)], buckets[~(first | alike)])

    def _bands(self, examples: IntArray, start: int) -> HashArray:
        """[examples] A hash of the band of each signature that begins at column `start`."""
        bands = np.empty(len(examples), np.uint64)
        for at in range(0, len(examples), _ROWS_AT_ONCE):
            rows = self._signatures[examples[at : at + _ROWS_AT_ONCE], start : start + self._rows]
            total = np.zeros(len(rows), np.uint64)
            for column in range(self._rows):
                total = total * _BAND_BASE + rows[:, column]
            bands[at : at + _ROWS_AT_ONCE] = total
        return bands

    def _alike(self, some: IntArray, others: IntArray) -> npt.NDArray[np.bool_]:
        """Pair by pair, whether the whole is `threshold` alike and each part half of that."""
        alike = np.empty(len(some), np.bool_)
        for at, same in self._same(some, others):
            parts = same[:, NUM_PERMUTATIONS:].reshape(len(same), -1, PART_PERMUTATIONS).mean(2)
            whole = same[:, :NUM_PERMUTATIONS].mean(1)
            alike[at : at + len(same)] = (whole >= self._threshold) & (parts >= self._threshold / 2).all(1)
        return alike

    def _similarities(self, some: IntArray, others: IntArray) -> npt.NDArray[np.float32]:
        """Pair by pair, the estimate of the whole."""
        whole = np.empty(len(some), np.float32)
        for at, same in self._same(some, others):
            whole[at : at + len(same)] = same[:, :NUM_PERMUTATIONS].mean(1)
        return whole

    def _same(self, some: IntArray, others: IntArray) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
        """[pairs, columns] Where two signatures agree, some pairs at a time, each lot with the number of its first."""
        for at in range(0, len(some), _ROWS_AT_ONCE):
            part = slice(at, at + _ROWS_AT_ONCE)
            yield at, self._signatures[some[part]] == self._signatures[others[part]]


def _shared(examples: IntArray, bands: HashArray) -> tuple[IntArray, HashArray]:
    """The examples that share their band with another one, bucket by bucket, each bucket in the user's order."""
    order = np.argsort(bands, kind="stable")
    return _crowded(examples[order], bands[order])


def _crowded(members: IntArray, buckets: HashArray) -> tuple[IntArray, HashArray]:
    """Without the buckets that hold one."""
    same = buckets[1:] == buckets[:-1]
    crowded = np.zeros(len(members), np.bool_)
    crowded[1:] |= same
    crowded[:-1] |= same
    return members[crowded], buckets[crowded]


def _roots(of: IntArray, examples: IntArray) -> IntArray:
    """[examples] Where the chain of each ends: an example that stays."""
    roots = of[examples]
    while (inner := of[roots] >= 0).any():
        roots = np.where(inner, of[roots], roots)
    return roots


def rows_per_band(permutations: int, threshold: float) -> int:
    """The widest band with which two examples that are `threshold` alike share one with a probability of 0.99."""
    fitting = [
        rows for rows in range(1, permutations + 1) if (1 - threshold**rows) ** (permutations // rows) <= _MISSED
    ]
    return max(fitting, default=1)
