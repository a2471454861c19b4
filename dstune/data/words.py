"""A text as hashed words, and as hashed runs of n words: what duplicates and contamination are found by.

A word is a run of letters and digits in lower case; punctuation, blanks and case do not count. Scripts that are written without
blanks (Chinese, Japanese, Thai, …) have a word per character. Hashes are the same on every machine and in every process.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

HashArray = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]

_CHARACTER_BASE = np.uint64(0x9E3779B97F4A7C15)
_WORD_BASE = np.uint64(0xD1342543DE82EF95)
_LETTER, _ALONE = 1, 2
_CHARACTERS_AT_ONCE = 1 << 20
_TABLE_SIZE = 0x20000
"""Above stand ideographs (to 0x3FFFF) and what is no word."""
_WITHOUT_BLANKS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # ideographs
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
)


@dataclass(frozen=True)
class Words:
    """The words of some texts, in order."""

    hashes: HashArray
    """[words]"""
    offsets: IntArray
    """[texts + 1] Those of text i are the words from `offsets[i]` to `offsets[i + 1]`."""
    starts: IntArray
    """[words] Where each begins in `text`."""
    ends: IntArray
    """[words] Where each ends in `text`."""
    alone: npt.NDArray[np.bool_]
    """[words] Whether it is one character of a script that is written without blanks."""
    text: str
    """All texts in lower case, a line end between two."""

    def between(self, first: int, count: int) -> str:
        """The text from word `first` on, `count` words long."""
        return self.text[self.starts[first] : self.ends[first + count - 1]]

    def text_of(self, word: int) -> int:
        """Which text it stands in."""
        return int(np.searchsorted(self.offsets, word, "right")) - 1

    def run_offsets(self, n: int) -> IntArray:
        """[texts + 1] As `offsets`, for the runs of `n` words that `runs` gives."""
        return np.concatenate([[0], np.cumsum(np.maximum(np.diff(self.offsets) - n + 1, 0))])

    def runs(self, n: int) -> HashArray:
        """A hash of each run of `n` words within one text, text by text."""
        every = ngrams(self.hashes, n)
        last = np.repeat(self.offsets[1:], np.diff(self.offsets))[: len(every)]
        return every[np.arange(n, len(every) + n) <= last]

    def wholes(self) -> HashArray:
        """[texts] A hash of all words of each text, in order; 0 where it has none."""
        lengths = np.diff(self.offsets)
        wholes = np.zeros(len(lengths), np.uint64)
        if len(self.hashes):
            place = np.arange(len(self.hashes)) - np.repeat(self.offsets[:-1], lengths)
            terms = self.hashes * _powers(int(lengths.max()))[place]
            wholes[lengths > 0] = _mixed(np.add.reduceat(terms, self.offsets[:-1][lengths > 0]))
        return wholes


def words(texts: Sequence[str]) -> Words:
    """The words of `texts` with their hashes. Many short texts at once cost less than one after another.

    Memory is bounded beside the texts and 40 bytes per word: long ones are looked at a million characters at a time.
    """
    lower = [text.lower() for text in texts]
    joined = "\n".join(lower)
    found = [_words(joined[start:end], start) for start, end in _slices(joined)]
    hashes, starts, ends, alone = (np.concatenate(column) for column in zip(*found, strict=True))
    ends_of_texts = np.cumsum([len(text) + 1 for text in lower])
    offsets = np.concatenate([[0], np.searchsorted(starts, ends_of_texts)])
    return Words(hashes, offsets, starts, ends, alone, joined)


def _slices(text: str) -> Iterator[tuple[int, int]]:
    """Where to look at a time: up to a blank, so that no word is cut (only one of a million letters is)."""
    start = 0
    while len(text) - start > _CHARACTERS_AT_ONCE:
        limit = start + _CHARACTERS_AT_ONCE
        end = max(text.rfind(" ", start, limit), text.rfind("\n", start, limit)) + 1 or limit
        yield start, end
        start = end
    yield start, len(text)


_Found = tuple[HashArray, IntArray, IntArray, npt.NDArray[np.bool_]]


def _words(text: str, offset: int) -> _Found:
    """Hashes, starts, ends of the words of `text` in lower case, which begins at `offset`, and which are one character alone."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _kinds()[np.minimum(codes, _TABLE_SIZE + (codes >= 0x40000))]
    inside = np.flatnonzero(kinds)
    if not len(inside):
        none = np.zeros(0, np.int64)
        return np.zeros(0, np.uint64), none, none, none > 0
    begins = kinds == _ALONE
    begins[0] |= kinds[0] == _LETTER
    begins[1:] |= (kinds[1:] == _LETTER) & (kinds[:-1] != _LETTER)
    starts = np.flatnonzero(begins)
    first = np.searchsorted(inside, starts)
    lengths = np.diff(first, append=len(inside))
    place = np.arange(len(inside)) - np.repeat(first, lengths)
    terms = (codes[inside].astype(np.uint64) + np.uint64(1)) * _powers(int(lengths.max()))[place]
    hashes = _mixed(np.add.reduceat(terms, first))
    return hashes, starts + offset, starts + lengths + offset, kinds[starts] == _ALONE


def ngrams(hashes: HashArray, n: int) -> HashArray:
    """[words - n + 1] A hash of each run of `n` words, in order; of fewer than `n` words: none."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for offset in range(n):
        total *= _WORD_BASE
        total += hashes[offset : offset + count]
    return _mixed(total)


def _mixed(values: HashArray) -> HashArray:
    """Every bit of the result depends on every bit of the value (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _powers(count: int) -> HashArray:
    """The first `count` powers of the characters' base, modulo 2^64."""
    few = _few_powers()
    return few if count <= len(few) else np.multiply.accumulate(np.full(count, _CHARACTER_BASE))


@cache
def _few_powers() -> HashArray:
    return np.multiply.accumulate(np.full(64, _CHARACTER_BASE))


@cache
def _kinds() -> npt.NDArray[np.uint8]:
    """[code points] Whether a character is part of a word, a word by itself, or neither; the last two: ideographs, all above."""
    kinds = np.zeros(_TABLE_SIZE + 2, np.uint8)
    kinds[:_TABLE_SIZE] = [unicodedata.category(chr(code))[0] in "LNM" for code in range(_TABLE_SIZE)]
    for first, last in _WITHOUT_BLANKS:
        kinds[first : last + 1] *= _ALONE
    kinds[_TABLE_SIZE] = _ALONE
    return kinds
