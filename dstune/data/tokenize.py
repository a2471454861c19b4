"""Conversations become examples: token ids exactly as `apply_chat_template` gives them, and which of them are targets."""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Literal

import numpy as np
import tokenizers

from dstune.data.annotate import TRUSTED_ROLES
from dstune.data.control import ControlTokens, TextTokenizer, unknown_token
from dstune.data.conversation import Conversation, Example, Message, Refused
from dstune.data.identity import fingerprint
from dstune.data.lossy import LossCheck, describe
from dstune.data.render import Renderer, Span
from dstune.data.spelled import Laid, Match, SpelledTokens, token_ids
from dstune.data.templates import Template, resolve_template
from dstune.data.token_mask import token_mask
from dstune.data.tokenizer_files import load_tokenizer
from dstune.errors import ConfigError, Problem

__all__ = ["Encoder", "Template", "load_tokenizer", "resolve_template"]


class Encoder:
    """Renders, tokenises and marks conversations. Picklable; the same everywhere."""

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        train_on: Literal["assistant", "last", "all", "weights"] = "assistant",
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
        serialised = self._backend.to_str()
        parsed = json.loads(serialised)
        written = template.source + (template.tool_source or "")
        self._control = ControlTokens(
            tokenizer.added_tokens_decoder, written, unknown_token(self._backend, parsed["model"])
        )
        self._renderer = Renderer(template, tokenizer.special_tokens_map, self._control.pattern, self.now)
        self._spelled = SpelledTokens(self._control, self._renderer, TextTokenizer(serialised, self._control))
        self._loss = LossCheck(self._backend, parsed, self._control.unknown)
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
        laid: list[tuple[int, Laid]] = []
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

    def _lay(self, conversation: Conversation) -> Laid:
        if self.seq2seq:
            conversation = _up_to_answer(conversation)
        rendered = self._renderer.render(conversation)
        text = rendered.text
        if self.train_on == "all":
            return Laid(conversation, text, ((0, len(text)),), ((0, len(text)),))
        spans = self._targets(conversation, self._renderer.spans(conversation, rendered))
        if not spans:
            raise Refused("no_supervised_tokens", "no answer to learn in this conversation")
        if not self.seq2seq:
            return Laid(conversation, text, ((0, len(text)),), tuple((span.start, span.end) for span in spans))
        start, end = spans[0].start, spans[-1].end
        if not text[:start].strip():
            raise Refused("empty_prompt", "nothing stands before the answer")
        return Laid(conversation, text, ((0, start), (start, end)), ((start, end),))

    def _targets(self, conversation: Conversation, spans: list[Span]) -> list[Span]:
        """The spans that `train_on` and the file's own weights leave."""
        if self.train_on == "last" or self.seq2seq:
            last = max(
                (n for n, message in enumerate(conversation.messages) if message.role == "assistant"), default=-1
            )
            spans = [span for span in spans if span.message == last]
        return [span for span in spans if conversation.messages[span.message].train is not False]

    def _example(self, laid: Laid, encodings: list[tokenizers.Encoding]) -> Example:
        ids = token_ids(encodings)
        spelled: frozenset[Match] = frozenset()
        own: list[Match] = []
        where: Callable[[int], int] = int
        if self.control_tokens != "allow" and not self._as_expected(laid.conversation, ids):
            matches = self._spelled.matches(laid, encodings)
            spelled = self._spelled.among(laid, matches)
            own = [match for match in matches if match not in spelled]
        if spelled:
            if self.control_tokens == "error":
                names = sorted({self._control.names[match.number] for match in spelled})
                raise Refused("control_tokens", f"the text spells {', '.join(names)}")
            encodings, where = self._spelled.reencode(laid, own)
            ids = token_ids(encodings)
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
        return self._control.sequence(token_ids(self._encode([laid.text[start:end] for start, end in laid.pieces])))

    def _lost(self, laid: Laid, ids: np.ndarray) -> int:
        if self._loss.lossless:
            return 0
        text = "".join(laid.text[start:end] for start, end in laid.pieces)
        (lost,) = self._loss.lost([text], [ids.tolist()])
        if lost and self.lossy_text != "allow":
            raise Refused("lossy_text", f"the tokenizer has no tokens for {describe(lost)}")
        return lost.total()

    def _mask(self, laid: Laid, encodings: list[tokenizers.Encoding], where: Callable[[int], int]) -> np.ndarray:
        """bool [length]: the tokens of which any character is a target."""
        if self.seq2seq:
            source, target = (len(encoding.ids) for encoding in encodings)
            return np.repeat([False, True], [source, target])
        (encoding,) = encodings
        if self.train_on == "all":
            mask = np.ones(len(encoding.ids), dtype=bool)
        else:
            mask = token_mask(encoding, ((where(start), where(end)) for start, end in laid.spans))
        mask[:1] = False
        return mask


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
