"""Tokenising at memory speed where it is certain to give the same tokens, and targets found by counting bytes.

`gigatoken` does for byte-level BPE what `tokenizers` does, some thirty times as fast. Nothing rests on its word: a tokenizer is taken
only if it is of that kind and agrees on hard texts, every text's tokens must spell as many bytes as it has, and of the run's own
texts every so many are tokenised by both (`Encoder`). Offsets need no tokenizer then: each token's length in bytes is known.
"""

import json
import logging
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tokenizers

from dstune.loggers import get_logger

log = get_logger(__name__)

_HARD_TEXTS = (
    "Hello world! It's 12345 o'clock; we'LL see…  two  spaces\n\n\nthree lines\t\ttabs \r\n windows \u00a0 no-break",
    "def f(x):\n    return {'a': [1, 2.5e-10], \"b\": x**2 != 0}  # comment\n\n\n\n\t\t}",
    "北京在哪里？它是中国的首都。日本語のテキスト、한국어 텍스트도 있어요。 ไทย العربية עברית हिन्दी",
    "naïve café e\u0301 \u1e9b\u0323 ﬁ ½ ² ™ \u200b zero\u200dwidth \ufeff 👩‍👩‍👧‍👦 🇩🇪 \U0001f469\U0001f3fd",
    "a" * 300 + " " * 40 + "!" * 50 + "\n" * 20 + "1" * 30 + "'s't're'VE'm'll'D don’t",
    "\x00\x01\x7f\x85\u2028\u2029\ufffd\U0010fffd \\n \\u0041 https://example.org/?a=b&c=%20#x <b>html</b> [1](2) `code`",
    " leading", "trailing ", "\n", " ", "",
)  # fmt: skip


_NO_IDS = np.zeros(0, dtype=np.uint32)


class Tokens(NamedTuple):
    """Several texts' tokens end to end."""

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    """[texts + 1]: text i has the tokens offsets[i]:offsets[i + 1]."""
    ends: npt.NDArray[np.int64]
    """[tokens]: bytes of all texts up to each token's end."""
    starts: npt.NDArray[np.int64]
    """[texts + 1]: bytes of all texts before each text."""
    faithful: npt.NDArray[np.bool_]
    """[texts]: whether a text's tokens spell as many bytes as it has; what is said of another text is not to be used."""


class FastTokens:
    """A byte-level BPE tokenizer without offsets, special tokens or padding."""

    def __init__(self, serialised: str, lengths: npt.NDArray[np.int64], composes: bool) -> None:
        """`serialised`: a tokenizer.json; lengths: [vocabulary] bytes that each token spells; `composes`: it makes texts NFC."""
        import gigatoken

        self._backend: Any = gigatoken.Tokenizer.from_json(serialised).backend
        self._lengths = lengths
        self._composes = composes

    def encode(self, texts: Sequence[str]) -> Tokens:
        """The tokens of `texts`."""
        # One by one: it is as fast as its batches, whose results want a library that takes a second to import.
        found = [self._backend.encode(text) for text in texts]
        offsets = np.cumsum([0, *map(len, found)], dtype=np.int64)
        ids = np.concatenate([_NO_IDS, *found]).astype(np.int32)
        ends = np.cumsum(self._lengths[ids])
        starts = np.concatenate([[0], ends])[offsets]
        sizes = np.array([self._size(text) for text in texts], dtype=np.int64)
        return Tokens(ids, offsets, ends, starts, np.diff(starts) == sizes)

    def _size(self, text: str) -> int:
        """Bytes of `text`; -1 where the tokenizer would change it first."""
        if text.isascii():
            return len(text)
        return len(text.encode()) if not self._composes or unicodedata.is_normalized("NFC", text) else -1


def fast_tokens(
    tokenizer: tokenizers.Tokenizer, text: str, serialised: dict[str, Any]
) -> Callable[[], FastTokens | None]:
    """Makes the fast side of `tokenizer` (its tokenizer.json as `text` and parsed), where there is one that agrees with it; else None.

    It takes half a second with a large vocabulary, so that a process makes it when it has something to encode.
    """
    lengths = _lengths(serialised)
    if lengths is None:
        return _none
    composes = serialised["normalizer"] is not None
    plain = serialised["truncation"] is None and serialised["padding"] is None
    given = text if plain else json.dumps(serialised | {"truncation": None, "padding": None})
    texts = [*_HARD_TEXTS, *(f"a {token['content']} b" for token in serialised["added_tokens"][:64])]

    def make() -> FastTokens | None:
        try:
            found = FastTokens(given, lengths, composes)
            theirs = tokenizer.encode_batch(texts, add_special_tokens=False)
            ours = found.encode(texts)
        except Exception as error:  # noqa: BLE001 (a library's refusal, of whatever type: the slow side does it all)
            log.log(logging.DEBUG, "no fast tokenizer: %s", error)
            return None
        agree = ours.ids.tolist() == [number for encoding in theirs for number in encoding.ids]
        return found if agree else None

    return make


def _none() -> None:
    """There is no fast side."""


def _lengths(serialised: dict[str, Any]) -> npt.NDArray[np.int64] | None:
    """int64 [vocabulary]: bytes of each token; None for tokenizers that are not byte-level BPE of the text as it is."""
    model, before = serialised["model"], serialised["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    plain = (
        model.get("type") == "BPE"
        and serialised["normalizer"] in (None, {"type": "NFC"})
        and not model.get("byte_fallback")
        and not model.get("dropout")
        and sum(step.get("type") == "ByteLevel" for step in steps) == 1
        and not any(step.get("add_prefix_space") or step.get("behavior") == "Removed" for step in steps)
        and not any(token[side] for token in serialised["added_tokens"] for side in ("lstrip", "rstrip", "single_word"))
    )
    if not plain:
        return None
    vocabulary: dict[str, int] = model["vocab"]
    added = {token["id"]: len(token["content"].encode()) for token in serialised["added_tokens"]}
    lengths = np.zeros(max([*vocabulary.values(), *added]) + 1, dtype=np.int64)
    for word, number in vocabulary.items():
        lengths[number] = len(word)  # one letter of the byte alphabet for each byte
    for number, length in added.items():
        lengths[number] = length
    return lengths


def byte_places(text: str, spans: Sequence[tuple[int, int]], before: int) -> list[tuple[int, int]]:
    """Where in bytes the characters of `spans` (start, end exclusive) stand, `text` following `before` other bytes."""
    if text.isascii():
        return [(before + start, before + end) for start, end in spans]
    places: list[tuple[int, int]] = []
    reached, at = 0, before
    for start, end in spans:  # in the order of the text
        first = at + len(text[reached:start].encode())
        reached, at = end, first + len(text[start:end].encode())
        places.append((first, at))
    return places


def covered(tokens: Tokens, spans: Sequence[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """bool [tokens]: those that stand for any byte of `spans` (start and end in bytes of all texts, end exclusive)."""
    places = np.array(spans, dtype=np.int64).reshape(-1, 2)
    first = np.searchsorted(tokens.ends, places[:, 0], side="right")
    begins = np.concatenate([np.zeros(1, dtype=np.int64), tokens.ends[:-1]])
    past = np.searchsorted(begins, places[:, 1], side="left")
    size = len(tokens.ids) + 1
    steps = np.bincount(first, minlength=size)[:size] - np.bincount(past, minlength=size)[:size]
    return np.cumsum(steps[:-1]) > 0
