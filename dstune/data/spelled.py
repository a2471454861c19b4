"""Which control tokens of a tokenised conversation its author spelled, and the tokens of the same text with those as text."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers

from dstune.data.annotate import Pieces, Range
from dstune.data.control import ControlTokens, TextTokenizer
from dstune.data.conversation import Conversation, Refused
from dstune.data.render import Renderer


@dataclass(frozen=True)
class Laid:
    """One conversation as text, cut into the pieces that are tokenised each by itself (causal: one; else source, target)."""

    conversation: Conversation
    text: str
    pieces: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int], ...]
    """Characters that are targets."""


@dataclass(frozen=True)
class Match:
    """A control token in a tokenised text."""

    number: int
    start: int
    end: int


class SpelledTokens:
    """Tells spelled control tokens from the template's own."""

    def __init__(self, control: ControlTokens, renderer: Renderer, as_text: TextTokenizer) -> None:
        self._control = control
        self._renderer = renderer
        self._as_text = as_text

    def matches(self, laid: Laid, encodings: list[tokenizers.Encoding]) -> list[Match]:
        """The control tokens among the tokens, with the characters of the text that they stand for."""
        matches: list[Match] = []
        for (offset, _), encoding in zip(laid.pieces, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            for place in self._control.positions(ids).tolist():
                characters = encoding.token_to_chars(place)
                assert characters is not None
                match = Match(int(ids[place]), offset + characters[0], offset + characters[1])
                name = self._control.names[match.number]
                if match.number != self._control.unknown or laid.text[match.start : match.end].strip() == name:
                    matches.append(match)
        return matches

    def among(self, laid: Laid, matches: list[Match]) -> frozenset[Match]:
        """Those matches that come from the conversation's own text. Raises Refused where that cannot be told."""
        if not matches:
            return frozenset()
        ranges = self._renderer.annotate(laid.conversation, laid.text)
        if ranges is None:
            ranges = self._renderer.annotate(
                laid.conversation, laid.text, self._spellings(laid.conversation), lenient=True
            )
        if ranges is None:
            came = (
                f"template {self._renderer.template.name}: cannot tell the template's control tokens from spelled ones"
            )
            raise Refused("control_tokens_unresolved", came)
        starts = [found.start for found in ranges]
        return frozenset(match for match in matches if self._is_spelled(match, ranges, starts, laid.conversation))

    def _spellings(self, conversation: Conversation) -> Pieces:
        """Marks only the control tokens that are spelled, apart from those that an assistant may write."""

        def pieces(text: str, owner: int) -> Iterator[tuple[int, int]]:
            speech = owner >= 0 and conversation.messages[owner].role == "assistant"
            pattern = self._control.special_pattern if speech else self._control.pattern
            return (match.span() for match in pattern.finditer(text))

        return pieces

    def _is_spelled(self, match: Match, ranges: list[Range], starts: list[int], conversation: Conversation) -> bool:
        first = max(bisect_right(starts, match.start) - 1, 0)
        for found in ranges[first : bisect_right(starts, match.end)]:
            empty = found.start == found.end and match.start <= found.start <= match.end
            if empty or (found.start < match.end and match.start < found.end):
                speaker = conversation.messages[found.message].role if found.message >= 0 else ""
                return not (speaker == "assistant" and self._control.is_speech(match.number))
        return False

    def reencode(self, laid: Laid, own: list[Match]) -> tuple[list[tokenizers.Encoding], Callable[[int], int]]:
        """Tokens of the text in which only the template's `own` control tokens are control tokens, and where a character went."""
        names = self._as_text.names(laid.text)
        if names is None:
            raise Refused("control_tokens_unresolved", "the text uses every private character")
        pieces: list[str] = []
        for start, end in laid.pieces:
            written, at = "", start
            for match in own:
                if start <= match.start < end:
                    written += laid.text[at : match.start] + names[match.number]
                    at = match.end
            pieces.append(written + laid.text[at:end])
        encodings = self._as_text.encode(pieces, names)
        ids = token_ids(encodings)
        if self._control.sequence(ids) != [match.number for match in own if match.number != self._control.unknown]:
            raise Refused("control_tokens_unresolved", "the tokenizer makes a control token out of ordinary text")
        ends = [match.end for match in own]
        grown = np.cumsum([0] + [len(names[m.number]) - (m.end - m.start) for m in own]).tolist()
        return encodings, lambda at: at + grown[bisect_right(ends, at)]


def token_ids(encodings: Sequence[tokenizers.Encoding]) -> np.ndarray:
    """int32: the tokens of all pieces, end to end."""
    if len(encodings) == 1:
        return np.array(encodings[0].ids, dtype=np.int32)
    return np.concatenate([np.array(encoding.ids, dtype=np.int32) for encoding in encodings])
