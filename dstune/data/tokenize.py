"""Conversations become examples: token ids exactly as `apply_chat_template` gives them, and which of them are targets."""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import Any, Literal

import numpy as np
import tokenizers

from dstune.data import instruction
from dstune.data.annotate import TRUSTED_ROLES
from dstune.data.control import ControlTokens, TextTokenizer, unknown_token
from dstune.data.conversation import Conversation, Example, Refused
from dstune.data.fast_tokens import FastTokens, byte_places, covered, fast_tokens
from dstune.data.identity import fingerprint
from dstune.data.lossy import LossCheck, describe
from dstune.data.render import Renderer, Span
from dstune.data.shapes import harmless, traits, up_to_answer
from dstune.data.skeleton import Skeletons
from dstune.data.spelled import Laid, Match, SpelledTokens, token_ids
from dstune.data.targets import TrainOn, target_turns, targets
from dstune.data.templates import Template, resolve_template
from dstune.data.token_mask import token_mask
from dstune.data.tokenizer_files import load_tokenizer
from dstune.errors import ConfigError, Problem, RunFailed

__all__ = ["Encoder", "Template", "load_tokenizer", "resolve_template"]

_ALL_COMPARED = 64
_EVERY = 256
"""Of a process's conversations the first ones, and then each so-manieth, take the long way beside the shortcut."""


class ShortcutDiffers(RunFailed):
    """A shortcut gave other tokens than the long way: what it gave before is not to be used either."""


class Encoder:
    """Renders, tokenises and marks conversations. Picklable; the same everywhere."""

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        train_on: TrainOn = "assistant",
        control_tokens: Literal["encode", "error", "allow"] = "encode",
        lossy_text: Literal["error", "skip", "allow"] = "error",
        seq2seq: bool = False,
        now: datetime | None = None,
        shortcuts: bool = True,
        seed: int = 0,
    ) -> None:
        """`now` is what a template's `strftime_now` tells; without `shortcuts` everything goes the long way; `seed` draws one of
        several instruction templates for each conversation.

        Raises ConfigError where the template cannot mark the assistant."""
        if not isinstance(tokenizer.backend_tokenizer, tokenizers.Tokenizer):
            raise ConfigError(
                Problem("model.tokenizer", "a tokenizer without a `tokenizers` backend", "a tokenizer.json")
            )
        if seq2seq and train_on == "all":
            came = "`all`: a sequence-to-sequence model's targets are the answer"
            raise ConfigError(Problem("data.train_on", came, "assistant or last"))
        self.tokenizer = tokenizer
        self.template = template
        self.train_on: TrainOn = train_on
        self.control_tokens = control_tokens
        self.lossy_text = lossy_text
        self.seq2seq = seq2seq
        self.now = now or datetime.now()
        self.seed = seed
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
        self._expected: dict[tuple[str, ...], list[int] | None] = {}
        self.shortcuts = shortcuts
        self._skeletons = Skeletons(template, tokenizer.special_tokens_map, self.now, self._rendered)
        self._make_fast = fast_tokens(self._backend, serialised, parsed)
        self._encoded = 0
        self._end = ""
        self._probe()

    def __reduce__(self) -> tuple[type["Encoder"], tuple[Any, ...]]:
        settings = (self.train_on, self.control_tokens, self.lossy_text, self.seq2seq, self.now)
        return Encoder, (self.tokenizer, self.template, *settings, self.shortcuts, self.seed)

    def without_shortcuts(self) -> "Encoder":
        """The same encoder, which goes the long way for everything."""
        other = copy.copy(self)
        other.shortcuts = False
        other.__dict__.pop("_fast", None)
        return other

    @cached_property
    def _fast(self) -> FastTokens | None:
        return self._make_fast() if self.shortcuts and self._loss.lossless else None

    def _probe(self) -> None:
        """Encode a plain conversation as a check of everything above, and look how a turn ends."""
        self.end_of_turn_ids: list[int] = []
        """The control token that ends an answer; empty where the template ends it by ordinary text."""
        try:
            conversation, rendered, spans = self._renderer.check()
        except ConfigError:
            if self.train_on == "all":  # nothing needs to be marked
                return
            raise
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
        self._end = "".join(self._control.names[number] for number in self.end_of_turn_ids)

    def encode(self, conversation: Conversation) -> Example:
        """One conversation as an example. Raises Refused."""
        (result,) = self.encode_batch([conversation])
        if isinstance(result, Refused):
            raise result
        return result

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Example | Refused]:
        """Each conversation's example, or why there is none, in order.

        Raises ShortcutDiffers where a shortcut and the long way, both of which some conversations take, give other tokens.
        """
        results: list[Example | Refused] = []
        laid: list[tuple[int, Laid]] = []
        for place, conversation in enumerate(conversations):
            results.append(Refused("pending"))
            try:
                if conversation.document:
                    results[place] = self._document(conversation)
                    continue
                laid.append((place, self._lay(self._asked(conversation), self.shortcuts)))
            except Refused as error:
                results[place] = error
        if self._fast is not None:
            laid = self._encode_fast(self._fast, laid, results)
        self._encode_long(laid, results)
        if self.shortcuts:
            self._compare(conversations, results)
        return results

    def _encode_long(self, laid: list[tuple[int, Laid]], results: list[Example | Refused]) -> None:
        texts = [one.text[start:end] for _, one in laid for start, end in one.pieces]
        encodings = iter(self._encode(texts))
        for place, one in laid:
            mine = [next(encodings) for _ in one.pieces]
            try:
                results[place] = self._example(one, mine)
            except Refused as error:
                results[place] = error

    def _encode_fast(
        self, fast: FastTokens, laid: list[tuple[int, Laid]], results: list[Example | Refused]
    ) -> list[tuple[int, Laid]]:
        """Fill in the results that are certain; returns what is left for the long way."""
        if not laid:
            return laid
        left: list[tuple[int, Laid]] = []
        tokens = fast.encode([one.text[start:end] for _, one in laid for start, end in one.pieces])
        offsets, starts, faithful = tokens.offsets.tolist(), tokens.starts.tolist(), tokens.faithful.tolist()
        spans: list[tuple[int, int]] = []
        taken: list[tuple[int, int, int]] = []
        controls = self._control.positions(tokens.ids)
        numbers, borders = tokens.ids[controls].tolist(), np.searchsorted(controls, tokens.offsets).tolist()
        unknown = self._control.unknown
        piece = 0
        for place, one in laid:
            first, piece = piece, piece + len(one.pieces)
            begin, end = offsets[first], offsets[piece]
            found = numbers[borders[first] : borders[piece]]
            certain = unknown not in found and found == self._expects(one.conversation)
            if certain and all(faithful[first:piece]):
                taken.append((place, begin, end))
                spans += byte_places(one.text, one.spans, starts[first])
            else:
                left.append((place, one))
        mask = covered(tokens, spans)
        for place, begin, end in taken:
            results[place] = self._finished(tokens.ids[begin:end], mask[begin:end])
        return left

    def _finished(self, ids: np.ndarray, mask: np.ndarray) -> Example | Refused:
        """The example of tokens in which nothing was spelled and nothing lost."""
        if self.seq2seq:
            ids, mask = self._ended(ids, mask)
        else:
            mask[:1] = False
        return Example(ids, mask) if mask.any() else _no_targets()

    def _compare(self, conversations: Sequence[Conversation], results: list[Example | Refused]) -> None:
        """Take the long way too for the first conversations and some of the others."""
        first, self._encoded = self._encoded, self._encoded + len(conversations)
        chosen = [
            at
            for at, conversation in enumerate(conversations)
            if not conversation.document and (first + at < _ALL_COMPARED or (first + at) % _EVERY == 0)
        ]
        again: list[Example | Refused] = [Refused("pending") for _ in chosen]
        laid: list[tuple[int, Laid]] = []
        for place, at in enumerate(chosen):
            try:
                laid.append((place, self._lay(self._asked(conversations[at]), False)))
            except Refused as error:
                again[place] = error
        self._encode_long(laid, again)
        for at, theirs in zip(chosen, again, strict=True):
            if not _same(results[at], theirs):
                raise ShortcutDiffers(
                    f"a shortcut and the long way differ for a conversation of {len(conversations[at].messages)} messages"
                )

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """What the result of encoding depends on, beside the conversations."""
        return fingerprint(self.tokenizer, self.template, self.now, self.seed)

    def summary(self) -> dict[str, Any]:
        """For manifests and people: how answers are marked and end, and whether the tokenizer can lose text."""
        return {
            "template": self.template.name,
            "mask": "all" if self.train_on == "all" else "generation" if self._renderer.marks_itself else "comparison",
            "end_of_turn": self.tokenizer.convert_ids_to_tokens(self.end_of_turn_ids),
            "lossless": self._loss.lossless,
        }

    @property
    def keeps_lines(self) -> bool:
        """Whether the tokenizer gives line breaks and tabs back."""
        return self._loss.keeps_lines

    def _encode(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        self._backend.no_truncation()
        self._backend.no_padding()
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def _rendered(self, conversation: Conversation) -> tuple[str, list[tuple[int, int, int]]]:
        """The text, and the assistant's spans in it where they matter."""
        rendered = self._renderer.render(conversation)
        if self.train_on == "all" and not self._needs_spans(conversation):
            return rendered.text, []
        return rendered.text, [
            (span.start, span.end, span.message) for span in self._renderer.spans(conversation, rendered)
        ]

    def _needs_spans(self, conversation: Conversation) -> bool:
        """Whether everything is a target but a turn that the file excludes."""
        return self.train_on == "all" and any(message.train is False for message in conversation.messages)

    def _asked(self, conversation: Conversation) -> Conversation:
        """With one of several instruction templates drawn for it, and its input where that has its place."""
        if not self.template.num_variants:
            return conversation
        variant = instruction.drawn(conversation, self.template.num_variants, self.seed)
        return replace(instruction.apart(conversation) if self.template.takes_input else conversation, variant=variant)

    def _lay(self, conversation: Conversation, shortcut: bool) -> Laid:
        if self.seq2seq:
            conversation = up_to_answer(conversation)
        shortcut = shortcut and not self._needs_spans(conversation)
        text, found = self._skeletons.lay(conversation) if shortcut else self._rendered(conversation)
        spans = [Span(*span) for span in found]
        if not self.seq2seq:
            places = targets(conversation, text, spans, self.train_on, self._renderer, self._end)
            return Laid(conversation, text, ((0, len(text)),), places)
        spans = [span for span in spans if span.message == len(conversation.messages) - 1]
        if not spans or len(conversation.messages) - 1 not in target_turns(conversation, self.train_on):
            raise Refused("no_supervised_tokens", "the last answer of this conversation is not to be learned")
        start, end = spans[0].start, spans[-1].end
        if not text[:start].strip():
            raise Refused("empty_prompt", "nothing stands before the answer")
        return Laid(conversation, text, ((0, start), (start, end)), ((start, end),))

    def _document(self, conversation: Conversation) -> Example:
        """Plain text between the tokenizer's beginning (where it writes one) and end of sequence; all but the first is a target."""
        end = self.tokenizer.eos_token_id
        if self.seq2seq or end is None:
            why = (
                "a sequence-to-sequence model learns answers"
                if self.seq2seq
                else "the tokenizer has no end of sequence"
            )
            raise Refused("document", f"plain text cannot be learned here: {why}")
        text = "".join(message.content for message in conversation.messages)
        laid = Laid(conversation, text, ((0, len(text)),), ((0, len(text)),))
        encodings = self._encode([text])
        spelled = [] if self.control_tokens == "allow" else self._spelled.matches(laid, encodings)
        if spelled and self.control_tokens == "error":
            raise self._spells(spelled)
        if spelled:
            encodings, _ = self._spelled.reencode(laid, [])
        ids = token_ids(encodings)
        begin = (
            []
            if self.tokenizer("")["input_ids"][:1] != [self.tokenizer.bos_token_id]
            else [self.tokenizer.bos_token_id]
        )
        lost = self._lost(laid, ids)
        ids = np.concatenate([np.array(begin, dtype=np.int32), ids, np.array([end], dtype=np.int32)])
        mask = np.ones(len(ids), dtype=bool)
        mask[0] = False
        return Example(ids, mask, len(spelled), lost)

    def _spells(self, spelled: Iterable[Match]) -> Refused:
        names = sorted({self._control.names[match.number] for match in spelled})
        return Refused("control_tokens", f"the text spells {', '.join(names)}")

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
                raise self._spells(spelled)
            encodings, where = self._spelled.reencode(laid, own)
            ids = token_ids(encodings)
        lost = self._lost(laid, ids)
        mask = self._mask(laid, encodings, where)
        if self.seq2seq:
            ids, mask = self._ended(ids, mask)
        if not mask.any():
            raise _no_targets()
        return Example(ids, mask, len(spelled), lost)

    def _ended(self, ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """With the end of sequence that a sequence-to-sequence model's answer ends by, also where the template writes none."""
        if self.tokenizer.eos_token_id in (None, int(ids[-1])):
            return ids, mask
        return np.append(ids, np.int32(self.tokenizer.eos_token_id)), np.append(mask, True)

    def _as_expected(self, conversation: Conversation, ids: np.ndarray) -> bool:
        """Whether the control tokens are those of the same conversation with harmless contents: then none was spelled."""
        unknown = self._control.unknown
        if unknown is not None and (ids == unknown).any():
            return False
        return self._expects(conversation) == self._control.sequence(ids)

    def _expects(self, conversation: Conversation) -> list[int] | None:
        """The control tokens of a conversation of this shape with harmless contents; None where that says nothing."""
        if conversation.tools:
            return None
        shape = [str(conversation.variant)]
        for m in conversation.messages:
            if m.tool_calls or m.role not in TRUSTED_ROLES:
                return None
            shape += (m.role, "") if m.is_plain and m.content and not m.content.isspace() else (m.role, traits(m))
        key = tuple(shape)
        if key not in self._expected:
            self._expected[key] = self._control_sequence(harmless(conversation))
        return self._expected[key]

    def _control_sequence(self, conversation: Conversation) -> list[int] | None:
        try:
            laid = self._lay(conversation, False)
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
        if laid.spans == ((0, len(laid.text)),):
            mask = np.ones(len(encoding.ids), dtype=bool)
        else:
            mask = token_mask(encoding, ((where(start), where(end)) for start, end in laid.spans))
        mask[:1] = False
        return mask


def _no_targets() -> Refused:
    return Refused("no_supervised_tokens", "no token of this conversation is a target")


def _same(one: Example | Refused, other: Example | Refused) -> bool:
    if isinstance(one, Refused) or isinstance(other, Refused):
        return str(one) == str(other)
    return np.array_equal(one.input_ids, other.input_ids) and np.array_equal(one.loss_mask, other.loss_mask)
