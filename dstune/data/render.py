"""A conversation as text, and the characters in it that are the assistant's: what a model would have to write itself.

Where the template says so (`{% generation %}`) its word is taken, and checked. Where it does not, an answer starts where the
template's own generation prompt ends, and ends where the template goes on after it: both are compared with renderings of the
conversation up to the answer and up to its end. What cannot be shown is refused, never guessed.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from functools import cached_property
from typing import Any, NamedTuple

import jinja2

from dstune.data.annotate import Marks, Pieces, Range, core
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.jinja_sandbox import ChatTemplate, Rendered, TemplateLimit
from dstune.data.said import must_appear, spellings, spoken, spoken_core, thoughts
from dstune.data.templates import Template
from dstune.errors import ConfigError, Problem

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_STUMBLES = (
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    IndexError,
    ArithmeticError,
    RecursionError,
)
"""What a template runs into that does not fit the conversation."""
_SHORT = 12
"""Characters of a content that may stand in a text by chance."""
_PROBES = (
    (Message("user", "Name a colour."), Message("assistant", "A shade of green.")),
    (Message("system", "Be brief."), Message("user", "Name a colour."), Message("assistant", "A shade of green.")),
)


def has_marks(source: str) -> bool:
    """Whether a template says itself what the assistant writes."""
    return _GENERATION.search(source) is not None


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
        self._own = None if template.own is None else ChatTemplate(template.own, now)
        self.marks_itself = has_marks(template.source)

    def render(self, conversation: Conversation, prompt: bool = False) -> Rendered:
        """The conversation's text. Raises Refused where the template refuses it or drops something of it."""
        tools = list(conversation.tools) or None
        rendered = self._render(conversation.to_dicts(), tools, prompt, conversation.variant)
        if not prompt:
            self._check_complete(conversation, rendered.text)
            self._check_own(conversation, rendered.text)
        return rendered

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, prompt: bool, variant: int = 0
    ) -> Rendered:
        variables = {**self._variables, "variant": variant} if self.template.num_variants else self._variables
        try:
            return self._compiled[bool(tools)].render(messages, tools, variables, prompt)
        except (jinja2.TemplateError, TemplateLimit) as error:
            raise Refused("template_refused", f"template {self.template.name}: {error}") from None
        except _STUMBLES as error:
            raise Refused(
                "template_failed", f"template {self.template.name}: {type(error).__name__}: {error}"
            ) from None

    def _check_own(self, conversation: Conversation, text: str) -> None:
        """Where a built-in template stands in for another, that one must write the same."""
        if self._own is None:
            return
        try:
            theirs = self._own.render(conversation.to_dicts(), list(conversation.tools) or None, self._variables).text
        except (jinja2.TemplateError, TemplateLimit, *_STUMBLES) as error:
            raise Refused("template_refused", f"template {self.template.name}: {error}") from None
        if theirs != text:
            detail = f"template {self.template.name}: the two write different texts here; name one by `data.template`"
            raise Refused("template_differs", detail)

    def _check_complete(self, conversation: Conversation, text: str) -> None:
        """No template may lose a turn on the quiet (an assistant's thoughts of earlier turns apart, which many leave out)."""
        for number, message in enumerate(conversation.messages):
            last = number + 1 == len(conversation.messages)
            for said in must_appear(message) + (thoughts(message) if last else []):
                if not any(spelling in text for spelling in spellings(said)):
                    raise self._drops(message, number, said)
        self._check_short(conversation, text)
        for tool in conversation.tools:
            if not any(name in text for name in spellings(tool["function"].get("name", ""))):
                raise self._hides_tools()

    def _check_short(self, conversation: Conversation, text: str) -> None:
        """What is short may stand in the text by chance: there the template must show where it put it."""
        said = [message.content.strip() for message in conversation.messages]
        short = [number for number, one in enumerate(said) if 0 < len(one) <= _SHORT]
        named = any(len(tool["function"].get("name", "")) <= _SHORT for tool in conversation.tools)
        ranges = self.annotate(conversation, text) if short or named else None
        if ranges is None:
            return
        shown = {found.message for found in ranges if found.start < found.end}
        for number in short:
            if number not in shown:
                raise self._drops(conversation.messages[number], number, said[number])
        if named and -1 not in shown:
            raise self._hides_tools()

    def _hides_tools(self) -> Refused:
        detail = f"template {self.template.name} does not show the tools; `data.template: chatml` does"
        return Refused("template_drops_content", detail)

    def _drops(self, message: Message, number: int, said: str) -> Refused:
        detail = f"template {self.template.name} leaves out or changes what message {number} ({message.role}) says"
        hint = "; it knows no tool calls: `data.template: chatml` does" if message.tool_calls else ""
        if said in thoughts(message):
            hint = "; it shows no thoughts: `data.template` chatml, qwen3, deepseek and glm do"
        return Refused("template_drops_content", detail + hint)

    def annotate(
        self, conversation: Conversation, text: str, pieces: Pieces = core, lenient: bool = False
    ) -> list[Range] | None:
        """Which ranges of `text` come from the conversation; None where marking it changes what the template writes."""
        try:
            marks = Marks(conversation, pieces)
            found, ranges = marks.find(
                self._render(marks.messages, marks.tools, False, conversation.variant).text, lenient
            )
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
        ranges = self.annotate(conversation, rendered.text, spoken_core) or []
        spans: list[Span] = []
        for number in wanted:
            before = spans[-1].end if spans else 0
            found = self._framed(conversation, rendered.text, number, ranges, before)
            spans.append(Span(*(found or self._compared(conversation, rendered.text, number, ranges, before)), number))
        return spans

    def turn(self, conversation: Conversation, text: str, number: int, end: str) -> tuple[int, int]:
        """The characters of a message that is not the assistant's: what it says, and `end` where that follows at once.

        Raises Refused where the template does not show it whole and unchanged.
        """
        said = conversation.messages[number].content
        mine = [found for found in self.annotate(conversation, text) or [] if found.message == number]
        if len(mine) != 1 or text[mine[0].start : mine[0].end] != said.strip():
            role = conversation.messages[number].role
            detail = f"template {self.template.name} does not show which tokens are those of message {number} ({role})"
            raise Refused("mask_unverified", f"{detail}; only the assistant's turns can be told apart here")
        start, stop = mine[0].start, mine[0].end
        for blanks in (said[len(said.rstrip()) :], ""):
            if end and text.startswith(blanks + end, stop):
                return start, stop + len(blanks) + len(end)
        return start, stop

    def check_thoughts(self, conversation: Conversation, number: int, targets: str) -> None:
        """Raises Refused where an answer among the `targets` has thoughts that the template leaves out there."""
        for thought in thoughts(conversation.messages[number]):
            if not any(spelling in targets for spelling in spellings(thought)):
                came = (
                    f"template {self.template.name} leaves out what message {number} thinks, and its answer is a target"
                )
                do = "`data.turns: expand` makes every answer an example of its own, with its thoughts"
                raise Refused("reasoning_left_out", f"{came}; {do}")

    def _unverified(self, number: int) -> Refused:
        detail = f"template {self.template.name} does not show which tokens are the assistant's in message {number}"
        return Refused("mask_unverified", f"{detail}; put them between {{% generation %}} and {{% endgeneration %}}")

    def _own_spans(self, conversation: Conversation, rendered: Rendered, wanted: list[int]) -> list[Span]:
        blocks = [(start, end) for start, end in rendered.generation if start < end]
        if len(blocks) == len(wanted):
            spans = [Span(start, end, number) for (start, end), number in zip(blocks, wanted, strict=True)]
        else:
            ranges = self.annotate(conversation, rendered.text) or []
            spans = _attributed(blocks, ranges)
        for number in wanted:
            written = "".join(rendered.text[span.start : span.end] for span in spans if span.message == number)
            for said in must_appear(conversation.messages[number]):
                if not any(spelling in written for spelling in spellings(said)):
                    raise self._unverified(number)
        if any(span.message not in wanted for span in spans):
            raise self._unverified(wanted[-1])
        return spans

    def _framed(
        self, conversation: Conversation, text: str, number: int, ranges: list[Range], before: int
    ) -> tuple[int, int] | None:
        """The span between the template's generation prompt and its closing, where nothing of another message stands between."""
        mine = [found for found in ranges if found.message == number]
        frame = self._frame
        if not mine or not frame.header.strip():
            return None
        at = text.rfind(frame.header, before, mine[0].start)
        if at < 0:
            return None
        start = at + len(frame.header)
        if text.startswith(frame.opening, at) and at + len(frame.opening) <= mine[0].start:
            start = at + len(frame.opening)
        closing = frame.closing if number + 1 == len(conversation.messages) else frame.inner_closing
        if conversation.messages[number].tool_calls and not self.control.search(closing):
            return None  # what a call ends by is not known
        end = self._behind(text, mine[-1].end, spoken(conversation.messages[number].content), closing)
        if end is None or any(other.message != number and other.start < end and start < other.end for other in ranges):
            return None
        return start, end

    def _compared(
        self, conversation: Conversation, text: str, number: int, ranges: list[Range], before: int
    ) -> tuple[int, int]:
        """The span that the rendering up to this answer, with the generation prompt, and the one up to its end leave between."""
        tools = list(conversation.tools) or None
        messages = conversation.to_dicts()
        if not number:
            raise self._unverified(number)
        prompt = self._render(messages[:number], tools, True).text
        whole = self._render(messages[: number + 1], tools, False).text
        if not text.startswith(prompt) or not text.startswith(whole) or not before <= len(prompt) < len(whole):
            raise self._unverified(number)
        if (
            prompt == self._render(messages[:number], tools, False).text
        ):  # no generation prompt: a header would not show
            ranges = self.annotate(conversation, text) or ranges
            mine = [found for found in ranges if found.message == number]
            headless = self._is_headless and conversation.messages[number].tool_calls
            if not mine or (text[len(prompt) : mine[0].start].strip() and not headless):
                raise self._unverified(number)
        written = text[len(prompt) : len(whole)]
        for said in must_appear(conversation.messages[number]):
            if not any(spelling in written for spelling in spellings(said)):
                raise self._unverified(number)
        return len(prompt), len(prompt) + self._turn_end(written)

    def _turn_end(self, written: str) -> int:
        """Up to the last control token, where only blanks follow it: those the model never writes."""
        found = list(self.control.finditer(written))
        if found and not written[found[-1].end() :].strip():
            return found[-1].end()
        return len(written)

    def _behind(self, text: str, at: int, said: str, closing: str) -> int | None:
        """Where the turn ends whose last visible character stands before `at`: with the template's closing, which follows."""
        for blanks in (said[len(said.rstrip()) :], ""):
            if text.startswith(blanks + closing, at):
                return at + len(blanks) + self._turn_end(closing)
        found = text.find(closing, at) if self.control.search(closing) else -1
        return None if found < 0 else found + self._turn_end(closing)

    @cached_property
    def _is_headless(self) -> bool:
        """Whether a plain answer stands right behind the question: then all of a call is the assistant's too."""
        for messages in _PROBES:
            try:
                prompt, whole = self._plain(messages[:-1], prompt=True), self._plain(messages)
            except Refused:
                continue
            return whole.startswith(prompt) and whole[len(prompt) :].lstrip().startswith(messages[-1].content)
        return False

    @cached_property
    def _frame(self) -> "_Frame":
        """What this template writes before and after a plain answer."""
        for messages in _PROBES:
            try:
                frame = self._framing(messages)
            except Refused:
                continue
            if frame is not None:
                return frame
        return _Frame("", "", "", "")

    def _framing(self, messages: tuple[Message, ...]) -> "_Frame | None":
        answer = messages[-1].content
        prompt, whole = self._plain(messages[:-1], prompt=True), self._plain(messages)
        base = len(self._common(self._plain(messages[:-1]), prompt))
        if whole.count(answer) != 1 or not whole.startswith(prompt[:base]):
            return None
        opening, (shown, _, closing) = prompt[base:], whole[base:].partition(answer)
        if not self._agree(opening, shown):
            return None
        header, inner_closing = self._common(opening, shown), closing
        try:
            longer = self._plain((*messages, Message("user", "And another?"), Message("assistant", "Grey.")))
        except Refused:
            return _Frame(opening, header, closing, closing)
        inner, _, after = longer[base:].partition(answer)
        if longer.startswith(prompt[:base]) and self._agree(opening, inner):
            header, inner_closing = self._common(header, inner), self._inner_closing(closing, after)
        return _Frame(opening, header, closing, inner_closing)

    def _inner_closing(self, closing: str, after: str) -> str:
        """What ends an answer that another question follows: as the last one ends, or by another control token in its place."""
        common = self._common(closing, after)
        last, inner = self.control.search(closing), self.control.search(after)
        if self.control.search(common) or not last or not inner or closing[: last.start()] != after[: inner.start()]:
            return common
        return after[: inner.end()]

    def _agree(self, opening: str, shown: str) -> bool:
        """Whether an answer stands behind its generation prompt, or behind a part of it that a control token makes certain.

        Some templates put more into the prompt than into a conversation, or the other way round (`<think>`).
        """
        if shown.startswith(opening) and shown:
            return True
        return self.control.search(self._common(opening, shown)) is not None

    def _common(self, one: str, other: str) -> str:
        """The start that both have, not ending within a control token."""
        differs = (at for at, (mine, theirs) in enumerate(zip(one, other, strict=False)) if mine != theirs)
        length = next(differs, min(len(one), len(other)))
        for match in (*self.control.finditer(one), *self.control.finditer(other)):
            if match.start() < length < match.end():
                length = match.start()
        return one[:length]

    def _plain(self, messages: tuple[Message, ...], prompt: bool = False) -> str:
        return self._render(Conversation(messages).to_dicts(), None, prompt).text

    def check(self) -> tuple[Conversation, Rendered, list[Span]]:
        """A plain conversation, rendered and marked. Raises ConfigError where this template cannot do that."""
        failures: list[Refused] = []
        for messages in self.template.probes or _PROBES:
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
    """The generation prompt."""
    header: str
    """As much of it as every answer has before it."""
    closing: str
    """What follows the last answer."""
    inner_closing: str
    """What follows every other one."""


def _attributed(blocks: list[tuple[int, int]], ranges: list[Range]) -> list[Span]:
    """Whose blocks these are; one without a word of anybody's (an end of turn by itself) belongs to the one before it."""
    spans: list[Span] = []
    for start, end in blocks:
        owners = {found.message for found in ranges if found.start < end and start < found.end}
        before = spans[-1].message if spans else -1
        spans.append(Span(start, end, owners.pop() if len(owners) == 1 else -1 if owners else before))
    return spans
