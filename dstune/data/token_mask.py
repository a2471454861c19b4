"""From characters that are targets to tokens that are."""

from collections.abc import Iterable

import numpy as np
import tokenizers

_PROBED_CHARACTERS = 16


def token_mask(encoding: tokenizers.Encoding, spans: Iterable[tuple[int, int]]) -> np.ndarray:
    """bool [tokens]: the tokens that stand for any character of `spans` (start, end exclusive)."""
    mask = np.zeros(len(encoding.ids), dtype=bool)
    for start, end in spans:
        first, past = _token_range(encoding, start, end)
        mask[first:past] = True
    return mask


def _token_range(encoding: tokenizers.Encoding, start: int, end: int) -> tuple[int, int]:
    """The tokens (first, past the last) that stand for any character from `start` to before `end`."""
    first, past = _first_token(encoding, start), _first_token(encoding, end)
    if past < len(encoding.ids):
        begins = encoding.token_to_chars(past)
        if begins is not None and begins[0] < end:  # the token at the border holds the span's last characters too
            past += 1
    return first, past


def _first_token(encoding: tokenizers.Encoding, at: int) -> int:
    """The first token of a character at or after `at`; characters without a token (blanks that a tokenizer drops) are passed."""
    for position in range(at, at + _PROBED_CHARACTERS):
        token = encoding.char_to_token(position)
        if token is not None:
            return token
    ends = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 1]
    later = np.flatnonzero(ends > at)
    return int(later[0]) if len(later) else len(ends)
