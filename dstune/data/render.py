"""A conversation as text, and the characters in it that are the assistant's: what a model would have to write itself.

Where the template says so (`{% generation %}`) its word is taken, and checked. Where it does not, an answer starts where the
template's own generation prompt ends, and ends where the template goes on after it: both are compared with renderings of the
conversation up to the answer and up to its end. What cannot be shown is refused, never guessed.
"""

import json
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

import jinja2

from dstune.data.annotate import Marks, Pieces, Range, core
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.jinja_sandbox import ChatTemplate, Rendered, TemplateLimit
from dstune.data.templates import Template
from dstune.errors import ConfigError, Problem

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBES = (
    (Message("user", "Name a colour."), Message("assistant", "A shade of green.")),
    (Message("system", "Be brief."), Message("user", "Name a colour."), Message("assistant", "A shade of green.")),
)


class Span(NamedTuple):
    """Characters that one assistant message's author must learn to write, end of turn included."""

    start: int
    end: int
    """Exclusive."""
    message: int


class Renderer:
    """Renders conversations by one template; `control` finds the template's control tokens in a text."""

    def __init__(
        self, template: Template, variables: Mapping[str, Any], control: re.Pattern[str], now: datetime
    ) -> None:
        """Raises ConfigError, naming the template, where it cannot mark the assistant's tokens in a plain conversation."""
        self.template = template
        self.control = control
        self._variables = dict(variables)
        self._compiled = {
            tools: ChatTemplate(source, now)
            for tools, source in ((False, template.source), (True, template.for_tools(True)))
        }
        self.marks_itself = bool(_GENERATION.search(template.source))

    def render(self, conversation: Conversation, prompt: bool = False) -> Rendered:
        """The conversation's text. Raises Refused where the template refuses it or drops something of it."""
        rendered = self._render(conversation.to_dicts(), list(conversation.tools) or None, prompt)
        if not prompt:
            self._check_complete(conversation, rendered.text)
        return rendered

    def _render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool) -> Rendered:
        try:
            return self._compiled[bool(tools)].render(messages, tools, self._variables, prompt)
        except (jinja2.TemplateError, TemplateLimit) as error:
            raise Refused("template_refused", f"template {self.template.name}: {error}") from None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
            raise Refused(
                "template_failed", f"template {self.template.name}: {type(error).__name__}: {error}"
            ) from None

    def _check_complete(self, conversation: Conversation, text: str) -> None:
        """No template may lose a turn on the quiet (an assistant's thoughts of earlier turns apart, which many leave out)."""
        for number, message in enumerate(conversation.messages):
            for said in _must_appear(message):
                if said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
                    detail = f"template {self.template.name} leaves out or changes what message {number} ({message.role}) says"
                    raise Refused("template_drops_content", detail)
        for tool in conversation.tools:
            if tool["function"].get("name", "") not in text:
                raise Refused("template_drops_content", f"template {self.template.name} does not show the tools")

    def annotate(self, conversation: Conversation, text: str, pieces: Pieces = core) -> list[Range] | None:
        """Which ranges of `text` come from the conversation; None where marking it changes what the template writes."""
        try:
            marks = Marks(conversation, pieces)
            found, ranges = marks.find(self._render(marks.messages, marks.tools, False).text)
        except (ValueError, Refused):
            return None
        return ranges if found == text else None

    def spans(self, conversation: Conversation, rendered: Rendered) -> list[Span]:
        """The assistant's spans, in order. Raises Refused where they cannot be shown."""
        wanted = [number for number, message in enumerate(conversation.messages) if message.role == "assistant"]
        if not wanted:
            return []
        if self.marks_itself:
            return self._own_spans(conversation, rendered, wanted)
        ranges = self.annotate(conversation, rendered.text, _spoken_core) or []
        spans: list[Span] = []
        for number in wanted:
            before = spans[-1].end if spans else 0
            found = self._framed(conversation, rendered.text, number, ranges, before)
            spans.append(Span(*(found or self._compared(conversation, rendered.text, number, before)), number))
        return spans

    def _unverified(self, number: int) -> Refused:
        detail = f"template {self.template.name} does not show which tokens are the assistant's in message {number}"
        return Refused("mask_unverified", f"{detail}; put them between {{% generation %}} and {{% endgeneration %}}")

    def _own_spans(self, conversation: Conversation, rendered: Rendered, wanted: list[int]) -> list[Span]:
        blocks = [(start, end) for start, end in rendered.generation if start < end]
        if len(blocks) == len(wanted):
            spans = [Span(start, end, number) for (start, end), number in zip(blocks, wanted, strict=True)]
        else:
            ranges = self.annotate(conversation, rendered.text) or []
            spans = [Span(start, end, _owner(start, end, ranges)) for start, end in blocks]
        for number in wanted:
            written = "".join(rendered.text[span.start : span.end] for span in spans if span.message == number)
            if any(said not in written for said in _must_appear(conversation.messages[number])):
                raise self._unverified(number)
        if any(span.message not in wanted for span in spans):
            raise self._unverified(wanted[-1])
        return spans

    def _framed(
        self, conversation: Conversation, text: str, number: int, ranges: list[Range], before: int
    ) -> tuple[int, int] | None:
        """The span between the template's generation prompt and its closing, where nothing of another message stands between."""
        mine = [found for found in ranges if found.message == number]
        if not mine or not self._frame.opening.strip():
            return None
        said = _spoken(conversation.messages[number].content)
        first, last = mine[0].start, mine[-1].end
        start = self._before(text, first, said)
        end = self._behind(text, last, said)
        if start is None:
            found = text.rfind(self._frame.opening, before, first)
            start = found + len(self._frame.opening) if found >= 0 else None
        if end is None and self.control.search(self._frame.closing):
            found = text.find(self._frame.closing, last)
            end = found + self._turn_end(self._frame.closing) if found >= 0 else None
        if start is None or end is None or start < before:
            return None
        if any(other.message != number and other.start < end and start < other.end for other in ranges):
            return None
        return start, end

    def _compared(self, conversation: Conversation, text: str, number: int, before: int) -> tuple[int, int]:
        """The span that the rendering up to this answer, with the generation prompt, and the one up to its end leave between."""
        tools = list(conversation.tools) or None
        messages = conversation.to_dicts()
        if not number:
            raise self._unverified(number)
        prompt = self._render(messages[:number], tools, True).text
        whole = self._render(messages[: number + 1], tools, False).text
        if not text.startswith(prompt) or not text.startswith(whole) or not before <= len(prompt) < len(whole):
            raise self._unverified(number)
        written = text[len(prompt) : len(whole)]
        for said in _must_appear(conversation.messages[number]):
            if said not in written and _escaped(said) not in written:
                raise self._unverified(number)
        return len(prompt), len(prompt) + self._turn_end(written)

    def _turn_end(self, written: str) -> int:
        """Up to the last control token, where only blanks follow it: those the model never writes."""
        found = list(self.control.finditer(written))
        if found and not written[found[-1].end() :].strip():
            return found[-1].end()
        return len(written)

    def _before(self, text: str, at: int, said: str) -> int | None:
        """Where an answer starts whose first visible character stands at `at`, right behind the generation prompt."""
        lead = said[: len(said) - len(said.lstrip())]
        for blanks in (lead, ""):
            if text.endswith(self._frame.opening + blanks, 0, at):
                return at - len(blanks)
        return None

    def _behind(self, text: str, at: int, said: str) -> int | None:
        """Where the turn ends whose last visible character stands before `at`, right before the template's closing."""
        trail = said[len(said.rstrip()) :]
        for blanks in (trail, ""):
            if text.startswith(blanks + self._frame.closing, at):
                return at + len(blanks) + self._turn_end(self._frame.closing)
        return None

    @cached_property
    def _frame(self) -> "_Frame":
        """What this template writes before and after a plain answer."""
        for messages in _PROBES:
            conversation = Conversation(messages)
            try:
                before = self._render(Conversation(messages[:-1]).to_dicts(), None, False).text
                prompt = self._render(Conversation(messages[:-1]).to_dicts(), None, True).text
                whole = self._render(conversation.to_dicts(), None, False).text
            except Refused:
                continue
            answer = messages[-1].content
            if prompt.startswith(before) and whole.startswith(prompt) and whole.count(answer) == 1:
                closing = whole[whole.index(answer) + len(answer) :]
                return _Frame(prompt[len(before) :], closing)
        return _Frame("", "")

    def check(self) -> tuple[Conversation, Rendered, list[Span]]:
        """A plain conversation, rendered and marked. Raises ConfigError where this template cannot do that."""
        failures: list[Refused] = []
        for messages in _PROBES:
            conversation = Conversation(messages)
            try:
                rendered = self.render(conversation)
                spans = self.spans(conversation, rendered)
            except Refused as error:
                failures.append(error)
                continue
            if spans:
                return conversation, rendered, spans
        came = failures[0].detail if failures else "its {% generation %} block is never reached"
        expected = "a template that shows the assistant's tokens"
        do = "put what the assistant writes between {% generation %} and {% endgeneration %}, or take a built-in template"
        raise ConfigError(Problem(f"data.template ({self.template.name})", came, expected, do))


class _Frame(NamedTuple):
    opening: str
    closing: str


def _owner(start: int, end: int, ranges: list[Range]) -> int:
    owners = {found.message for found in ranges if found.start < end and start < found.end}
    return owners.pop() if len(owners) == 1 else -1


def _escaped(said: str) -> str:
    return json.dumps(said, ensure_ascii=False)[1:-1]


def _must_appear(message: Message) -> list[str]:
    """What a rendering cannot do without: the content (of an assistant that thinks aloud, what follows its thoughts) and calls."""
    content = message.content
    if message.role == "assistant":
        content = _spoken(content)
    said = [content.strip()] if content.strip() else []
    return said + [call["function"]["name"] for call in message.tool_calls]


def _spoken(content: str) -> str:
    """An answer without the thoughts before it, which templates move or leave out."""
    return content.rpartition("</think>")[2]


def _spoken_core(value: str) -> Iterator[tuple[int, int]]:
    spoken = _spoken(value)
    offset = len(value) - len(spoken)
    for start, end in core(spoken):
        yield offset + start, offset + end
