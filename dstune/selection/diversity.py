"""Length and diversity: k-center over TF-IDF of what is asked, the longest answer among those that are about equally far.

Greedy k-center (Gonzalez 1985, "Clustering to minimize the maximum intercluster distance"; for choosing data: Sener and Savarese
2018, arXiv 1708.00489): take what is farthest from all that is taken, again and again. The distance of two texts is the root of
1 - cosine similarity, a metric from 0 to 1, so that k picks cover the data within twice the best possible radius, and a band:
distances of one band of 0.05 count as equal, and there the example with most answer tokens is taken, as long answers alone make
a strong choice (Zhao et al. 2024, "Long Is More for Alignment", arXiv 2402.04833). The first pick is the longest answer of all.

Cost: for n texts of w different words, memory 28 n w bytes or so (w is at most 256: the first 256 words of a text count), and for
each pick a pass over the texts that share its words: 200,000 questions and 5,000 picks take about a minute. Of more than 200,000
examples (or twice the picks) so many are drawn by seed first, and only they are compared.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from dstune.data.order import permute
from dstune.data.schedule import draw_seed
from dstune.data.shards import Prepared
from dstune.data.words import words
from dstune.selection.scores import Origins, Scored

MAX_CANDIDATES = 200_000

_BAND = 0.05
_WORDS_PER_TEXT = 256
_TEXTS_AT_ONCE = 1000
_REPORT_EVERY = 64
_ROUNDING = 1e-6
"""Weights are 32-bit: nearer than this is the same."""

IntArray = npt.NDArray[np.int64]
Told = Callable[[str, int], None]
"""Hears what is done, and how much of it."""


def num_compared(num_examples: int, count: int) -> int:
    """How many examples are compared for `count` picks."""
    return min(num_examples, max(MAX_CANDIDATES, 2 * count))


def candidates(num_examples: int, count: int, seed: int) -> IntArray:
    """The example numbers that are compared, ascending: all, or `num_compared` drawn by seed."""
    most = num_compared(num_examples, count)
    if num_examples == most:
        return np.arange(num_examples)
    return np.sort(permute(draw_seed(seed, "selection candidates"), 0, num_examples, np.arange(most)))


def score(prepared: Prepared, tokenizer: Any, origins: Origins, count: int, seed: int, told: Told) -> Scored:
    """Ranks: the picks in their order, then the other candidates, farthest first, then what was not compared.

    Columns: `distance` (to what was taken before it, or in the end; NaN for the first pick and for what was not compared) and
    `nearest` (the picked example that it is nearest to; -1 where it shares no word with any).
    """
    compared = candidates(prepared.num_examples, count, seed)
    index = Index.of(_noting(texts(prepared, tokenizer, compared), told), len(compared))
    lengths = origins.targets[compared]
    picked = k_center(index, lengths, min(count, len(compared)), told)
    order = np.concatenate([picked.picks, picked.others])
    distance, nearest = np.full(prepared.num_examples, np.nan), np.full(prepared.num_examples, -1, dtype=np.int32)
    distance[compared] = picked.distance
    nearest[compared] = np.where(picked.nearest >= 0, compared[picked.nearest], -1)
    rest = np.setdiff1d(np.arange(prepared.num_examples), compared)
    rank = np.empty(prepared.num_examples, dtype=np.int64)
    rank[np.concatenate([compared[order], rest])] = np.arange(1, prepared.num_examples + 1)
    return Scored(rank, {"distance": distance, "nearest": nearest})


def texts(prepared: Prepared, tokenizer: Any, numbers: IntArray) -> Iterator[str]:
    """What is asked in each example: all that is no target, control tokens left out; of plain documents, all."""
    for first in range(0, len(numbers), _TEXTS_AT_ONCE):
        asked: list[list[int]] = []
        for number in numbers[first : first + _TEXTS_AT_ONCE].tolist():
            example = prepared.example(number)
            before = example.input_ids[~example.loss_mask]
            asked.append((before if len(before) > 1 else example.input_ids).tolist())
        yield from tokenizer.backend_tokenizer.decode_batch(asked, skip_special_tokens=True)


def _noting(found: Iterable[str], told: Told) -> Iterator[str]:
    for number, text in enumerate(found):
        if number % _TEXTS_AT_ONCE == 0:
            told("reading words", number)
        yield text


@dataclass(frozen=True)
class Index:
    """TF-IDF vectors of n texts, by text and by term, each of length 1.

    A term's weight is (1 + ln f) ln((1 + n) / (1 + d)) for f occurrences in the text and d texts that have it: what stands in
    every text (a template's words) weighs nothing.
    """

    starts: IntArray
    """[n + 1] where a text's terms begin."""
    terms: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    term_starts: IntArray
    """[terms + 1] where a term's texts begin."""
    texts: npt.NDArray[np.int32]
    text_weights: npt.NDArray[np.float32]
    empty: npt.NDArray[np.bool_]
    """[n] Texts without a word that tells them from the others: all at one place."""

    @property
    def num_texts(self) -> int:
        return len(self.empty)

    @classmethod
    def of(cls, found: Iterable[str], num_texts: int) -> "Index":
        """Of `num_texts` texts, read once."""
        hashes: list[npt.NDArray[np.uint32]] = [np.zeros(0, np.uint32)]
        frequencies: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
        sizes: list[IntArray] = [np.zeros(0, np.int64)]
        left = iter(found)
        while some := list(islice(left, _TEXTS_AT_ONCE)):
            different, times, each = _words_of(some)
            hashes.append(different)
            frequencies.append(times)
            sizes.append(each)
        known, terms = np.unique(np.concatenate(hashes), return_inverse=True)
        weights = 1 + np.log(np.concatenate(frequencies))
        return cls._weighted(np.concatenate(sizes), terms.astype(np.int32), weights, len(known), num_texts)

    @classmethod
    def _weighted(
        cls, sizes: IntArray, terms: npt.NDArray[np.int32], weights: npt.NDArray[Any], num_terms: int, num_texts: int
    ) -> "Index":
        having = np.bincount(terms, minlength=num_terms)
        weights = (weights * np.log((1 + num_texts) / (1 + having))[terms]).astype(np.float32)
        text_of = np.repeat(np.arange(num_texts, dtype=np.int32), sizes)
        norms = np.sqrt(np.bincount(text_of, weights.astype(np.float64) ** 2, minlength=num_texts))
        # A term of one text alone makes that text longer and nothing alike; one of all texts weighs nothing.
        shared = (having[terms] > 1) & (weights > 0)
        terms, text_of = terms[shared], text_of[shared]
        weights = (weights[shared] / norms[text_of]).astype(np.float32)
        by_term = np.argsort(terms, kind="stable")
        return cls(
            starts=_starts(np.bincount(text_of, minlength=num_texts)),
            terms=terms,
            weights=weights,
            term_starts=_starts(np.bincount(terms, minlength=num_terms)),
            texts=text_of[by_term],
            text_weights=weights[by_term],
            empty=norms == 0,
        )

    def similarities(self, text: int) -> npt.NDArray[np.float64]:
        """[n] cosine similarity of every text to `text`, 0 to 1."""
        if self.empty[text]:
            return self.empty.astype(np.float64)
        mine = slice(self.starts[text], self.starts[text + 1])
        spans = [(self.term_starts[term], self.term_starts[term + 1]) for term in self.terms[mine]]
        others = [np.zeros(0, np.int32), *(self.texts[start:stop] for start, stop in spans)]
        parts = [
            self.text_weights[start:stop] * weight
            for (start, stop), weight in zip(spans, self.weights[mine], strict=True)
        ]
        values = np.concatenate([np.zeros(0, np.float32), *parts])
        found = np.bincount(np.concatenate(others), values, minlength=self.num_texts).astype(np.float64, copy=False)
        found[found > 1 - _ROUNDING] = 1.0
        return found


def _words_of(some: Sequence[str]) -> tuple[npt.NDArray[np.uint32], IntArray, IntArray]:
    """Of each text its different words (as 32 bits, ascending) and how often each comes, text by text; and their number [texts]."""
    found = words(some)
    lengths = np.diff(found.offsets)
    text = np.repeat(np.arange(len(some), dtype=np.uint64), lengths)
    first = np.arange(len(text)) - np.repeat(found.offsets[:-1], lengths) < _WORDS_PER_TEXT
    keys, times = np.unique((text[first] << np.uint64(32)) | (found.hashes[first] >> np.uint64(32)), return_counts=True)
    sizes = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(some))
    return keys.astype(np.uint32), times, sizes


def _starts(sizes: npt.NDArray[Any]) -> IntArray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@dataclass(frozen=True)
class Picked:
    """k picks among n texts."""

    picks: IntArray
    """[k] in the order in which they were taken."""
    others: IntArray
    """[n - k] farthest from the picks first."""
    distance: npt.NDArray[np.float64]
    """[n] Of a pick: to those before it (NaN for the first); of the others: to the picks."""
    nearest: IntArray
    """[n] The pick that this is: text numbers; -1 where nothing is shared."""


def k_center(index: Index, lengths: npt.NDArray[Any], count: int, told: Told) -> Picked:
    """Pick `count` of the texts (`lengths` [n]: of their answers), 0 < count <= n."""
    similarity = np.zeros(index.num_texts)
    nearest = np.full(index.num_texts, -1, dtype=np.int64)
    distance = np.full(index.num_texts, np.nan)
    taken = np.zeros(index.num_texts, dtype=np.bool_)
    key = _key(similarity, lengths)
    picks: list[int] = []
    for number in range(count):
        if number % _REPORT_EVERY == 0:
            told("picking", number)
        pick = int(key.argmax())
        distance[pick] = np.sqrt(1 - similarity[pick]) if picks else np.nan
        picks.append(pick)
        taken[pick] = True
        found = index.similarities(pick)
        nearer = np.flatnonzero((found > similarity) & ~taken)
        similarity[nearer], nearest[nearer] = found[nearer], pick
        key[nearer] = _key(similarity[nearer], lengths[nearer])
        key[pick] = -1
    rest = np.flatnonzero(~taken)
    distance[rest] = np.sqrt(1 - similarity[rest])
    others = rest[np.argsort(-key[rest], kind="stable")]
    return Picked(np.array(picks, dtype=np.int64), others, distance, nearest)


def _key(similarity: npt.NDArray[np.float64], lengths: npt.NDArray[Any]) -> IntArray:
    """Larger is taken earlier: by the band of the distance, then by length; `argmax` takes the first of equals."""
    bands = np.floor(np.sqrt(1 - similarity) / _BAND + 1e-9).astype(np.int64)
    return (bands << 32) + lengths


def why(distance: float, nearest: str | None) -> str:
    """One example's number in words; `nearest`: the origin of the pick that it is nearest to, if it shares a word with any."""
    if np.isnan(distance):
        return "not drawn among those that were compared"
    return f"{distance:.3f} from what was taken" + (f", nearest {nearest}" if nearest else "")
