"""Text that a tokenizer cannot give back: characters that no token stands for, or only the unknown token."""

from collections import Counter
from typing import Any

import tokenizers

_FAITHFUL_NORMALIZERS = ("NFC",)
"""Other spellings of the same character: nothing is lost."""
_NUM_BYTES = 256


class LossCheck:
    """Compares texts with what their tokens decode to; a tokenizer that has a token for every byte needs no comparison."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, serialised: dict[str, Any], unknown: int | None) -> None:
        """`serialised` is its tokenizer.json; `unknown` the token for what it does not know, which gives nothing back."""
        self.lossless = is_lossless(serialised)
        """Nothing can be lost: the vocabulary has every byte."""
        self._tokenizer = tokenizer
        self._unknown = unknown
        self._normalizer = tokenizer.normalizer
        self._exact = _decodes_exactly(serialised)

    @property
    def keeps_lines(self) -> bool:
        """Whether line breaks and tabs come back: SentencePiece makes blanks of them before it looks."""
        text = "a\nb\tc"
        return self._tokenizer.decode(self._tokenizer.encode(text, add_special_tokens=False).ids).strip() == text

    def lost(self, texts: list[str], ids: list[list[int]]) -> list[Counter[str]]:
        """For each text how often which characters are lost; blanks too where the decoder does not place them freely."""
        if self.lossless:
            return [Counter() for _ in texts]
        known = [[number for number in numbers if number != self._unknown] for numbers in ids]
        decoded = self._tokenizer.decode_batch(known, skip_special_tokens=False)
        return [self._missing(text, back) for text, back in zip(texts, decoded, strict=True)]

    def _missing(self, text: str, back: str) -> Counter[str]:
        seen = str if self._exact else _visible
        if seen(text) == seen(back):
            return Counter()
        if self._normalizer is not None:
            text, back = self._normalizer.normalize_str(text), self._normalizer.normalize_str(back)
        return Counter(seen(text)) - Counter(seen(back))


def _decodes_exactly(serialised: dict[str, Any]) -> bool:
    """Whether decoding gives back every blank: byte-level, nothing put in front, no token that swallows blanks beside it."""
    before, after = serialised["pre_tokenizer"] or {}, serialised["decoder"] or {}
    steps = [step for step in before.get("pretokenizers", [before]) if step.get("type") == "ByteLevel"]
    swallows = any(token["lstrip"] or token["rstrip"] for token in serialised["added_tokens"])
    return after.get("type") == "ByteLevel" and not any(step["add_prefix_space"] for step in steps) and not swallows


def describe(lost: Counter[str]) -> str:
    """The lost characters for a message: `3 × '中' (U+4E2D), …`."""
    shown = [f"{count} × {char!r} (U+{ord(char):04X})" for char, count in sorted(lost.items())[:5]]
    more = f" and {len(lost) - 5} others" if len(lost) > 5 else ""
    return ", ".join(shown) + more


def _visible(text: str) -> str:
    return "".join(text.replace("▁", " ").split())


def is_lossless(serialised: dict[str, Any]) -> bool:
    """Whether a tokenizer (its tokenizer.json) has a token for every byte, and changes no character before it looks."""
    model = serialised["model"]
    vocabulary = model["vocab"]
    if model.get("type") != "BPE" or not isinstance(vocabulary, dict) or not _faithful(serialised["normalizer"]):
        return False
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(_NUM_BYTES))
    before = serialised["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    removes = any(step.get("behavior") == "Removed" for step in steps)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    return not removes and any(step.get("type") == "ByteLevel" for step in steps) and vocabulary.keys() >= set(alphabet)


def _faithful(normalizer: dict[str, Any] | None) -> bool:
    if normalizer is None:
        return True
    steps = normalizer.get("normalizers", [normalizer])
    return all(step["type"] in _FAITHFUL_NORMALIZERS or _is_space_mark(step) for step in steps)


def _is_space_mark(step: dict[str, Any]) -> bool:
    """SentencePiece writes blanks as ▁."""
    return (step["type"] == "Prepend" and step["prepend"] == "▁") or (
        step["type"] == "Replace" and step["content"] == "▁" and step["pattern"] == {"String": " "}
    )
