"""Conversations become examples: token ids exactly as `apply_chat_template` gives them, and which of them are targets."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
import tokenizers

from dstune.data.annotate import TRUSTED_ROLES, Pieces, Range
from dstune.data.control import ControlTokens, TextTokenizer, unknown_token
from dstune.data.conversation import Conversation, Example, Message, Refused
from dstune.data.identity import fingerprint
from dstune.data.lossy import LossCheck, describe
from dstune.data.render import Renderer, Span
from dstune.data.templates import Template, resolve_template
from dstune.data.tokenizer_files import load_tokenizer
from dstune.errors import ConfigError, Problem

__all__ = ["Encoder", "Template", "load_tokenizer", "resolve_template"]

_PROBED_CHARACTERS = 16


@dataclass(frozen=True)
class _Laid:
    """One conversation as text, cut into the pieces that are tokenised each by itself (causal: one; else source, target)."""

    conversation: Conversation
    text: str
    pieces: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int], ...]
    """Characters that are targets."""


@dataclass(frozen=True)
class _Match:
    """A control token in a tokenised text."""

    number: int
    start: int
    end: int


class Encoder:
    """Renders, tokenises and marks conversations. Picklable; the same everywhere."""

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        train_on: Literal["assistant", "last", "all"] = "assistant",
        control_tokens: Literal["encode", "error", "allow"] = "encode",
        lossy_text: Literal["error", "skip", "allow"] = "error",
        seq2seq: bool = False,
        now: datetime | None = None,
    ) -> None:
        """`now` is what a template's `strftime_now` tells. Raises ConfigError where the template cannot mark the assistant."""
        if not isinstance(tokenizer.backend_tokenizer, tokenizers.Tokenizer):
            raise ConfigError(
                Problem("model.tokenizer", "a tokenizer without a `tokenizers` backend", "a tokenizer.json")
            )
        if seq2seq and train_on == "all":
            came = "`all`: a sequence-to-sequence model's targets are the answer"
            raise ConfigError(Problem("data.train_on", came, "assistant or last"))
        self.tokenizer = tokenizer
        self.template = template
        self.train_on = train_on
        self.control_tokens = control_tokens
        self.lossy_text = lossy_text
        self.seq2seq = seq2seq
        self.now = now or datetime.now()
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        written = template.source + (template.tool_source or "")
        self._control = ControlTokens(tokenizer.added_tokens_decoder, written, unknown_token(self._backend))
        self._renderer = Renderer(template, tokenizer.special_tokens_map, self._control.pattern, self.now)
        self._as_text = TextTokenizer(self._backend, self._control)
        self._loss = LossCheck(self._backend, self._control.unknown)
        self._expected: dict[tuple[Any, ...], list[int] | None] = {}
        self._probe()

    def __reduce__(self) -> tuple[type["Encoder"], tuple[Any, ...]]:
        settings = (self.train_on, self.control_tokens, self.lossy_text, self.seq2seq, self.now)
        return Encoder, (self.tokenizer, self.template, *settings)

    def _probe(self) -> None:
        """Encode a plain conversation as a check of everything above, and look how a turn ends."""
        if self.train_on == "all":
            self.end_of_turn_ids: list[int] = []
            return
        conversation, rendered, spans = self._renderer.check()
        messages, source = conversation.to_dicts(), self.template.source
        theirs = self.tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False)
        if theirs != rendered.text:
            came = f"transformers renders {theirs[:200]!r}, dstune {rendered.text[:200]!r}"
            raise ConfigError(Problem(f"data.template ({self.template.name})", came, "the same text"))
        span = spans[-1]
        tokens = self._encode([rendered.text[span.start : span.end]])[0]
        controls = self._control.positions(np.array(tokens.ids, dtype=np.int32)).tolist()
        ends = controls and not self._backend.decode(tokens.ids[controls[-1] + 1 :]).strip()
        self.end_of_turn_ids = [tokens.ids[controls[-1]]] if ends else []
        """The control token that ends an answer; empty where the template ends it by ordinary text."""

    def encode(self, conversation: Conversation) -> Example:
        """One conversation as an example. Raises Refused."""
        (result,) = self.encode_batch([conversation])
        if isinstance(result, Refused):
            raise result
        return result

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Example | Refused]:
        """Each conversation's example, or why there is none, in order."""
        results: list[Example | Refused] = []
        laid: list[tuple[int, _Laid]] = []
        for place, conversation in enumerate(conversations):
            results.append(Refused("pending"))
            try:
                laid.append((place, self._lay(conversation)))
            except Refused as error:
                results[place] = error
        texts = [one.text[start:end] for _, one in laid for start, end in one.pieces]
        encodings = iter(self._encode(texts))
        for place, one in laid:
            mine = [next(encodings) for _ in one.pieces]
            try:
                results[place] = self._example(one, mine)
            except Refused as error:
                results[place] = error
        return results

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """What the result of encoding depends on, beside the conversations."""
        return fingerprint(self.tokenizer, self.template, self.now)

    def summary(self) -> dict[str, Any]:
        """For manifests and people: how answers are marked and end, and whether the tokenizer can lose text."""
        return {
            "template": self.template.name,
            "mask": "all" if self.train_on == "all" else "generation" if self._renderer.marks_itself else "comparison",
            "end_of_turn": self.tokenizer.convert_ids_to_tokens(self.end_of_turn_ids),
            "lossless": self._loss.lossless,
        }

    def _encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        self._backend.no_truncation()
        self._backend.no_padding()
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def _lay(self, conversation: Conversation) -> _Laid:
        if self.seq2seq:
            conversation = _up_to_answer(conversation)
        rendered = self._renderer.render(conversation)
        text = rendered.text
        if self.train_on == "all":
            return _Laid(conversation, text, ((0, len(text)),), ((0, len(text)),))
        spans = self._targets(conversation, self._renderer.spans(conversation, rendered))
        if not spans:
            raise Refused("no_supervised_tokens", "no answer to learn in this conversation")
        if not self.seq2seq:
            return _Laid(conversation, text, ((0, len(text)),), tuple((span.start, span.end) for span in spans))
        start, end = spans[0].start, spans[-1].end
        if not text[:start].strip():
            raise Refused("empty_prompt", "nothing stands before the answer")
        return _Laid(conversation, text, ((0, start), (start, end)), ((start, end),))

    def _targets(self, conversation: Conversation, spans: list[Span]) -> list[Span]:
        """The spans that `train_on` and the file's own weights leave."""
        if self.train_on == "last" or self.seq2seq:
            last = max(
                (n for n, message in enumerate(conversation.messages) if message.role == "assistant"), default=-1
            )
            spans = [span for span in spans if span.message == last]
        return [span for span in spans if conversation.messages[span.message].train is not False]

    def _example(self, laid: _Laid, encodings: list[tokenizers.Encoding]) -> Example:
        ids = _ids(encodings)
        spelled: list[_Match] = []
        where: Callable[[int], int] = int
        if self.control_tokens != "allow" and not self._as_expected(laid.conversation, ids):
            matches = self._matches(laid, encodings)
            spelled = self._spelled(laid, matches)
        if spelled:
            if self.control_tokens == "error":
                names = sorted({self._control.names[match.number] for match in spelled})
                raise Refused("control_tokens", f"the text spells {', '.join(names)}")
            own = [match for match in self._matches(laid, encodings) if match not in spelled]
            encodings, where = self._reencoded(laid, own)
            ids = _ids(encodings)
        lost = self._lost(laid, ids)
        mask = self._mask(laid, encodings, where)
        if self.seq2seq and self.tokenizer.eos_token_id not in (None, int(ids[-1])):
            ids, mask = np.append(ids, np.int32(self.tokenizer.eos_token_id)), np.append(mask, True)
        if not mask.any():
            raise Refused("no_supervised_tokens", "no token of this conversation is a target")
        return Example(ids, mask, len(spelled), lost)

    def _as_expected(self, conversation: Conversation, ids: np.ndarray) -> bool:
        """Whether the control tokens are those of the same conversation with harmless contents: then none was spelled."""
        if conversation.tools or any(m.tool_calls or m.role not in TRUSTED_ROLES for m in conversation.messages):
            return False
        shape = tuple(
            (m.role, bool(m.content.strip()), m.name is None, m.tool_call_id is None, m.reasoning is None)
            for m in conversation.messages
        )
        if shape not in self._expected:
            self._expected[shape] = self._control_sequence(_harmless(conversation))
        unknown = self._control.unknown
        return self._expected[shape] == self._control.sequence(ids) and (unknown is None or not (ids == unknown).any())

    def _control_sequence(self, conversation: Conversation) -> list[int] | None:
        try:
            laid = self._lay(conversation)
        except Refused:
            return None
        return self._control.sequence(_ids(self._encode([laid.text[start:end] for start, end in laid.pieces])))

    def _matches(self, laid: _Laid, encodings: list[tokenizers.Encoding]) -> list[_Match]:
        """The control tokens among the tokens, with the characters of the text that they stand for."""
        matches: list[_Match] = []
        for (offset, _), encoding in zip(laid.pieces, encodings, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            for place in self._control.positions(ids).tolist():
                characters = encoding.token_to_chars(place)
                assert characters is not None
                match = _Match(int(ids[place]), offset + characters[0], offset + characters[1])
                name = self._control.names[match.number]
                if match.number != self._control.unknown or laid.text[match.start : match.end].strip() == name:
                    matches.append(match)
        return matches

    def _spelled(self, laid: _Laid, matches: list[_Match]) -> list[_Match]:
        """Those matches that come from the conversation's own text. Raises Refused where that cannot be told."""
        if not matches:
            return []
        ranges = self._renderer.annotate(laid.conversation, laid.text)
        if ranges is None:
            ranges = self._renderer.annotate(
                laid.conversation, laid.text, self._spellings(laid.conversation), lenient=True
            )
        if ranges is None:
            came = f"template {self.template.name}: cannot tell the template's control tokens from spelled ones"
            raise Refused("control_tokens_unresolved", came)
        starts = [found.start for found in ranges]
        return [match for match in matches if self._is_spelled(match, ranges, starts, laid.conversation)]

    def _spellings(self, conversation: Conversation) -> Pieces:
        """Marks only the control tokens that are spelled, apart from those that an assistant may write."""

        def pieces(text: str, owner: int) -> Iterator[tuple[int, int]]:
            speech = owner >= 0 and conversation.messages[owner].role == "assistant"
            pattern = self._control.special_pattern if speech else self._control.pattern
            return (match.span() for match in pattern.finditer(text))

        return pieces

    def _is_spelled(self, match: _Match, ranges: list[Range], starts: list[int], conversation: Conversation) -> bool:
        first = max(bisect_right(starts, match.start) - 1, 0)
        for found in ranges[first : bisect_right(starts, match.end)]:
            empty = found.start == found.end and match.start <= found.start <= match.end
            if empty or (found.start < match.end and match.start < found.end):
                speaker = conversation.messages[found.message].role if found.message >= 0 else ""
                return not (speaker == "assistant" and self._control.is_speech(match.number))
        return False

    def _reencoded(self, laid: _Laid, own: list[_Match]) -> tuple[list[tokenizers.Encoding], Callable[[int], int]]:
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
        ids = _ids(encodings)
        if self._control.sequence(ids) != [match.number for match in own if match.number != self._control.unknown]:
            raise Refused("control_tokens_unresolved", "the tokenizer makes a control token out of ordinary text")
        ends = [match.end for match in own]
        grown = np.cumsum([0] + [len(names[m.number]) - (m.end - m.start) for m in own]).tolist()
        return encodings, lambda at: at + grown[bisect_right(ends, at)]

    def _lost(self, laid: _Laid, ids: np.ndarray) -> int:
        if self._loss.lossless:
            return 0
        text = "".join(laid.text[start:end] for start, end in laid.pieces)
        (lost,) = self._loss.lost([text], [ids.tolist()])
        if lost and self.lossy_text != "allow":
            raise Refused("lossy_text", f"the tokenizer has no tokens for {describe(lost)}")
        return lost.total()

    def _mask(self, laid: _Laid, encodings: list[tokenizers.Encoding], where: Callable[[int], int]) -> np.ndarray:
        """bool [length]: the tokens of which any character is a target."""
        if self.seq2seq:
            source, target = (len(encoding.ids) for encoding in encodings)
            return np.repeat([False, True], [source, target])
        (encoding,) = encodings
        mask = np.zeros(len(encoding.ids), dtype=bool)
        if self.train_on == "all":
            mask[:] = True
        else:
            for start, end in laid.spans:
                first, last = _token_range(encoding, where(start), where(end))
                mask[first:last] = True
        mask[:1] = False
        return mask


def _ids(encodings: Sequence[tokenizers.Encoding]) -> np.ndarray:
    if len(encodings) == 1:
        return np.array(encodings[0].ids, dtype=np.int32)
    return np.concatenate([np.array(encoding.ids, dtype=np.int32) for encoding in encodings])


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


def _harmless(conversation: Conversation) -> Conversation:
    """A conversation of the same shape with nothing in it."""
    return Conversation(
        tuple(
            Message(
                role=message.role,
                content="x" if message.content.strip() else "",
                name=None if message.name is None else "x",
                tool_call_id=None if message.tool_call_id is None else "x",
                reasoning=None if message.reasoning is None else "x",
            )
            for message in conversation.messages
        )
    )


def _up_to_answer(conversation: Conversation) -> Conversation:
    """Without the turns after the last answer: they are neither source nor target."""
    messages = list(conversation.messages)
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        raise Refused("no_supervised_tokens", "no answer to learn in this conversation")
    return Conversation(tuple(messages), conversation.tools)
