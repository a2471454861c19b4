"""Tokens as text that is safe and honest to look at: every character that cannot be seen is spelled."""

import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_JOINERS = "\u200c\u200d"
"""Of the invisible characters these two belong to words and emoji."""
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0").union(
    map(chr, (*range(0x180B, 0x1810), *range(0xE0100, 0xE01F0)))
)
"""Letters, marks and signs by their category, and drawn as nothing (Unicode's Default_Ignorable_Code_Point, and blank Braille)."""
_UNFINISHED = "\ufffd"
_MOST_TOKENS_OF_A_CHARACTER = 8


class Segment(NamedTuple):
    """A run of tokens that are all targets, or all not, as text."""

    text: str
    trained: bool


class Piece(NamedTuple):
    """One token and its text; several tokens where they make up one character."""

    ids: tuple[int, ...]
    text: str
    trained: bool


class Marked(NamedTuple):
    """The tokens of a vocabulary that deserve a mark of their own."""

    control: Mapping[int, str]
    """Added tokens and how they are spelled: the template's, those for reasoning and tools; not mere words."""
    unknown: int | None
    """Written in place of text that the tokenizer does not know; None where there is none, or where it means something else too."""
    lengths: Mapping[str, frozenset[int]]
    """How long the spellings are that begin with a character."""

    @classmethod
    def of(cls, tokenizer: Any) -> "Marked":
        unknown = tokenizer.unk_token_id
        if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
            unknown = None
        control = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if number != unknown and token.content.strip() and (token.special or not token.content.strip().isalnum())
        }
        lengths: dict[str, set[int]] = {}
        for text in control.values():
            lengths.setdefault(text[0], set()).add(len(text))
        return cls(control, unknown, {first: frozenset(found) for first, found in lengths.items()})

    def spelled(self, text: str) -> set[str]:
        """The control tokens whose spelling stands in `text`; quick for thousands of them."""
        names = set(self.control.values())
        return {
            text[start : start + length]
            for start, first in enumerate(text)
            for length in self.lengths.get(first, ())
            if text[start : start + length] in names
        }


def visible(text: str) -> str:
    """`text` with every control, bidirectional and invisible character spelled out: `\\x1b`, `\\u202e`; newlines stay."""
    return "".join(character if _is_shown(character) else _spelled(character) for character in text)


def _is_shown(character: str) -> bool:
    if character in "\n\t" or character in _JOINERS:
        return True
    if character in _BLANK:
        return False
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _spelled(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shortened(text: str, most: int) -> str:
    """At most `most` characters of `text`, its middle left out."""
    half = (most - 1) // 2
    return text if len(text) <= most else f"{text[:half]}…{text[-half:]}"


def many(count: int, one: str, several: str | None = None) -> str:
    """`1 example`, `1,000 examples`."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def segments(tokenizer: Any, input_ids: npt.NDArray[Any], loss_mask: npt.NDArray[Any]) -> list[Segment]:
    """The example's text in runs of trained and other tokens; control tokens are spelled.

    Each run is what the text grows by: a run alone would lose the space that some tokenizers drop at the beginning.
    """
    ends = [*(np.flatnonzero(loss_mask[1:] != loss_mask[:-1]) + 1).tolist(), len(input_ids)]
    found: list[Segment] = []
    start, before = 0, ""
    for end in ends:
        whole = _decode(tokenizer, input_ids[:end].tolist())
        text = whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, input_ids[start:end].tolist())
        found.append(Segment(text, bool(loss_mask[start])))
        start, before = end, whole
    return found


def pieces(tokenizer: Any, input_ids: npt.NDArray[Any], loss_mask: npt.NDArray[Any]) -> Iterator[Piece]:
    """The example token by token: all its ids in order, and each one's text as it stands in the whole.

    A token's text is what the text of the token before it grows by, so that blanks are where the decoder puts them. Tokens that are
    parts of one character come together, unless one of them is trained and the next is not.
    """
    ids, mask = input_ids.tolist(), loss_mask.tolist()
    before, start = 0, 0
    for end in range(1, len(ids) + 1):
        known, whole = _decode(tokenizer, ids[before:start]), _decode(tokenizer, ids[before:end])
        ends_here = end == len(ids) or mask[end] != mask[start] or end - start == _MOST_TOKENS_OF_A_CHARACTER
        if whole.endswith(_UNFINISHED) and not ends_here:
            continue
        text = whole[len(known) :] if whole.startswith(known) else _decode(tokenizer, ids[start:end])
        yield Piece(tuple(ids[start:end]), text, mask[start])
        before, start = start, end


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""
