"""Control tokens: those by which a template speaks to the model. Spelled in someone's text they must stay text.

To encode them as text without changing a token elsewhere, a second tokenizer knows every control token by a private name only;
the template's own are written by that name, the spelled ones stay as they are, and to it they are letters like any others.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

_PRIVATE_NAMES = tuple(range(0x10F000, 0x10F010))
_DIGITS = 0x10F100


class ControlTokens:
    """The control tokens of one tokenizer under one template."""

    def __init__(self, added: dict[int, Any], template_text: str, unknown: int | None) -> None:
        """`added` as `tokenizer.added_tokens_decoder`; a token that is not special counts where the template writes it.

        `unknown` is what the tokenizer itself writes for characters that it does not know.
        """
        self.names = {
            number: token.content
            for number, token in added.items()
            if token.content and (token.special or (token.content in template_text and not token.content.isspace()))
        }
        """Token id -> how it is spelled."""
        self.special = frozenset(number for number, token in added.items() if token.special)
        self.pattern = _pattern(self.names.values())
        self.special_pattern = _pattern(name for number, name in self.names.items() if number in self.special)
        self._known = np.zeros(max(self.names, default=-1) + 2, dtype=bool)
        self._known[list(self.names)] = True
        self.unknown = unknown

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Where in `ids` control tokens stand."""
        last = len(self._known) - 1  # the last entry is False: every larger id falls on it
        return np.flatnonzero(self._known[np.minimum(ids, last)])

    def sequence(self, ids: np.ndarray) -> list[int]:
        """The control tokens in `ids`, in order, without those that may stand for an unknown character."""
        found = ids[self.positions(ids)].tolist()
        return found if self.unknown is None else [number for number in found if number != self.unknown]

    def is_speech(self, number: int) -> bool:
        """Whether an assistant may write this token: it is in the vocabulary as ordinary text (`<think>`, `<tool_call>`)."""
        return number not in self.special


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


class TextTokenizer:
    """A tokenizer to which spelled control tokens are plain text."""

    def __init__(self, serialised: str, control: ControlTokens) -> None:
        """`serialised` is the tokenizer's tokenizer.json."""
        self._serialised = serialised
        self._control = control
        self._made: dict[int, tokenizers.Tokenizer] = {}

    def names(self, text: str) -> dict[int, str] | None:
        """Private names for the control tokens that `text` does not hold; None where it holds every one that could be."""
        for opening in _PRIVATE_NAMES:
            if chr(opening) not in text:
                return {number: _private(opening, number) for number in self._control.names}
        return None

    def encode(self, texts: Sequence[str], names: dict[int, str]) -> list[tokenizers.Encoding]:
        """Tokens of `texts`, in which the template's control tokens stand under `names`."""
        opening = ord(next(iter(names.values()))[0])
        if opening not in self._made:
            self._made[opening] = _renamed(json.loads(self._serialised), self._control.names, names)
        return self._made[opening].encode_batch(list(texts), add_special_tokens=False)


def unknown_token(tokenizer: tokenizers.Tokenizer, model: dict[str, Any]) -> int | None:
    """The token that the `model` of a tokenizer.json writes for what it does not know."""
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    return None if model.get("unk_token") is None else tokenizer.token_to_id(model["unk_token"])


def _private(opening: int, number: int) -> str:
    return chr(opening) + "".join(chr(_DIGITS + int(digit)) for digit in str(number)) + chr(opening)


def _renamed(serialised: dict[str, Any], old: dict[int, str], new: dict[int, str]) -> tokenizers.Tokenizer:
    """The tokenizer with other spellings for some tokens, ids unchanged, in its vocabulary too."""
    for token in serialised["added_tokens"]:
        token["content"] = new.get(token["id"], token["content"])
    spelled = {old[number]: name for number, name in new.items()}
    model = serialised["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {new.get(number, word): number for word, number in vocabulary.items()}
    else:  # unigram: pieces with scores, their place is their id
        model["vocab"] = [[new.get(number, piece), score] for number, (piece, score) in enumerate(vocabulary)]
    if model.get("unk_token") in spelled:
        model["unk_token"] = spelled[model["unk_token"]]
    if "merges" in model:
        pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if not spelled.keys() & {*pair, "".join(pair)}]
    serialised["truncation"] = serialised["padding"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(serialised))
