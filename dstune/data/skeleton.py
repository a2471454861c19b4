"""A template's text around contents that it does not look at: rendered once, then filled in for every conversation of that shape.

Rendering a chat template costs more than tokenising what it wrote. Most templates only put contents between fixed pieces. That is
found out, not assumed: the template is run once with stand-ins in place of the contents. A stand-in can be put out, joined and
stripped. Where the template asks something of it (`'</think>' in content`), the answer for the conversation at hand is given and
noted, and the skeleton holds for those conversations alone whose contents answer alike. Whatever else a template does with a
content ends the attempt, and such conversations are rendered one by one. (King, "Symbolic execution and program testing", 1976.)
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from itertools import accumulate
from typing import Any, NamedTuple

import jinja2
import jinja2.nodes
import jinja2.runtime
import jinja2.visitor

from dstune.data.conversation import Conversation, Refused
from dstune.data.jinja_sandbox import Environment, TemplateLimit, template_environment
from dstune.data.templates import Template

_FIRST_MARK = 0x100000
"""Private characters that stand for a content in the rendered text, two for each message: as it is, and stripped."""
_LAST_MARK = 0x10FFFD
_KNOWN_PER_SHAPE = 16
_FAILURES_PER_SHAPE = 4
_PASSING_FILTERS = frozenset({"count", "length", "list", "first", "last", "reverse", "selectattr", "rejectattr"})
"""Filters that hand on what a list holds, or count it, and look at nothing in it but by the tests."""
_TRUE_TESTS = frozenset({"defined", "string", "iterable", "sequence"})
_FALSE_TESTS = frozenset({"undefined", "none", "mapping", "number", "integer", "float", "boolean"})
_COMPARING_TESTS = frozenset({"eq", "equalto", "==", "ne", "!="})

Shape = tuple[str, ...]
Placed = list[tuple[int, int, int]]
"""Spans as (start, end, message), in characters, end exclusive."""
Lay = Callable[[Conversation], tuple[str, Placed]]


class Inspected(Exception):
    """The template looks at a content in a way that is not followed."""


class Condition(NamedTuple):
    """What the template asked of a content, and the answer."""

    message: int
    stripped: bool
    question: str
    operand: Any
    answer: bool

    def holds(self, contents: list[str]) -> bool:
        content = contents[self.message]
        return _QUESTIONS[self.question](content.strip() if self.stripped else content, self.operand) == self.answer


_QUESTIONS: dict[str, Callable[[str, Any], bool]] = {
    "contains": lambda content, operand: operand in content,
    "startswith": lambda content, operand: content.startswith(operand),
    "endswith": lambda content, operand: content.endswith(operand),
    "equals": lambda content, operand: content == operand,
    "any": lambda content, operand: bool(content),
}


class _StandIn:
    """What no answer is known for: everything asked of it ends the attempt."""

    def _refuse(self, *arguments: Any, **named: Any) -> Any:
        raise Inspected

    __bool__ = __len__ = __iter__ = __getitem__ = __contains__ = __hash__ = __format__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __mul__ = __rmul__ = __mod__ = __rmod__ = __int__ = __float__ = __index__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Inspected

    def __add__(self, other: Any) -> "_Joined":
        return _Joined(f"{self}{_put_out(other)}")

    def __radd__(self, other: Any) -> "_Joined":
        return _Joined(f"{_put_out(other)}{self}")


def _put_out(value: Any) -> str:
    if isinstance(value, str | _StandIn):
        return str(value)
    raise Inspected


class _Joined(_StandIn):
    """Text with contents in it."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text

    __format__ = object.__format__


class _Content(_StandIn):
    """A message's content."""

    def __init__(self, message: int, contents: list[str], asked: list[Condition], stripped: bool = False) -> None:
        self._message, self._contents, self._asked, self._stripped = message, contents, asked, stripped

    def __str__(self) -> str:
        return chr(_FIRST_MARK + 2 * self._message + self._stripped)

    def strip(self, *characters: Any) -> "_Content":
        if characters:
            raise Inspected
        return _Content(self._message, self._contents, self._asked, stripped=True)

    def startswith(self, prefix: Any) -> bool:
        return self._ask("startswith", prefix)

    def endswith(self, suffix: Any) -> bool:
        return self._ask("endswith", suffix)

    def __contains__(self, part: Any) -> bool:
        return self._ask("contains", part)

    def __eq__(self, other: object) -> bool:
        return self._ask("equals", other)

    def __ne__(self, other: object) -> bool:
        return not self._ask("equals", other)

    def __bool__(self) -> bool:
        return self._ask("any", "")

    __hash__ = _StandIn.__hash__
    __format__ = object.__format__

    def _ask(self, question: str, operand: Any) -> bool:
        if not isinstance(operand, str):
            raise Inspected
        asked = Condition(self._message, self._stripped, question, operand, True)
        condition = asked._replace(answer=asked.holds(self._contents))
        self._asked.append(condition)
        return condition.answer


class _Joins(jinja2.visitor.NodeTransformer):
    """`a ~ b` becomes `a + b`, which the stand-ins follow. Raises Inspected for what makes plain text out of them."""

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        first, *rest = (self.visit(one) for one in node.nodes)
        for one in rest:
            first = jinja2.nodes.Add(first, one, lineno=node.lineno)
        return first

    def _refuse(self, node: jinja2.nodes.Node) -> jinja2.nodes.Node:
        raise Inspected

    visit_Macro = visit_AssignBlock = visit_FilterBlock = visit_Import = visit_FromImport = visit_Include = _refuse
    visit_Extends = visit_Block = _refuse


class _Symbolic(Environment):
    """The template's environment, in which filters and tests know stand-ins."""

    def _parse(self, source: str, name: Any, filename: Any) -> jinja2.nodes.Template:
        return _Joins().visit(super()._parse(source, name, filename))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator != "+" and not isinstance(right, int | float):  # `'%s' % content` would put it out unseen
            raise Inspected
        return super().call_binop(context, operator, left, right)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float | jinja2.Undefined)


def _filter(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(real)
    def followed(*arguments: Any, **named: Any) -> Any:
        given = [one for one in arguments if not isinstance(one, jinja2.Environment | jinja2.runtime.Context)]
        first = given[0] if given else None
        if isinstance(first, _Content) and name == "trim" and len(given) == 1 and not named:
            return first.strip()
        if isinstance(first, _StandIn) and (name == "string" or (name in ("default", "d") and len(given) < 3)):
            return first
        if all(map(_is_plain, (*given, *named.values()))) or (
            name in _PASSING_FILTERS and not isinstance(first, _StandIn)
        ):
            return real(*arguments, **named)
        raise Inspected

    return followed


def _test(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(real)
    def followed(*arguments: Any, **named: Any) -> Any:
        if not any(isinstance(one, _StandIn) for one in arguments):
            return real(*arguments, **named)
        if name in _TRUE_TESTS | _FALSE_TESTS and len(arguments) == 1:
            return name in _TRUE_TESTS
        if name in _COMPARING_TESTS:
            return real(*arguments, **named)
        raise Inspected

    return followed


@dataclass(frozen=True)
class Skeleton:
    """A rendered text with places for contents, and where its spans begin and end."""

    pieces: tuple[str | tuple[int, bool], ...]
    """Fixed text, or (message, whether stripped)."""
    conditions: tuple[Condition, ...]
    spans: tuple[tuple[tuple[int, int], tuple[int, int], int], ...]
    """Start and end as (piece, characters into it), and the message."""

    def fits(self, contents: list[str]) -> bool:
        return all(condition.holds(contents) for condition in self.conditions)

    def fill(self, contents: list[str]) -> tuple[str, Placed]:
        """The text and the spans in it."""
        texts = _filled(self.pieces, contents)
        starts = [0, *accumulate(map(len, texts))]
        spans = [(starts[a] + into, starts[b] + onto, message) for (a, into), (b, onto), message in self.spans]
        return "".join(texts), spans


def _filled(pieces: tuple[str | tuple[int, bool], ...], contents: list[str]) -> list[str]:
    return [
        piece if isinstance(piece, str) else contents[piece[0]].strip() if piece[1] else contents[piece[0]]
        for piece in pieces
    ]


class Skeletons:
    """Lays out conversations by skeletons where that is certain, else by `lay`, from which they are learned."""

    def __init__(self, template: Template, variables: Mapping[str, Any], now: datetime, lay: Lay) -> None:
        """`lay` renders and marks one conversation; it raises Refused."""
        self._lay = lay
        self._variables = dict(variables)
        self._variants = template.num_variants
        self._known: dict[Shape, list[Skeleton]] = {}
        self._failures: dict[Shape, int] = {}
        try:
            environment = template_environment(_Symbolic, now)
            for name, real in list(environment.filters.items()):
                environment.filters[name] = _filter(name, real)
            for name, real in list(environment.tests.items()):
                environment.tests[name] = _test(name, real)
            self._environment = environment
            self._template: jinja2.Template | None = environment.from_string(template.source)
        except (Inspected, jinja2.TemplateError):
            self._template = None

    def lay(self, conversation: Conversation) -> tuple[str, Placed]:
        """The conversation's text and the assistant's spans, the same as by `lay` itself. Raises Refused as it does."""
        shape = self._shape(conversation)
        if shape is None:
            return self._lay(conversation)
        contents = [message.content for message in conversation.messages]
        known = self._known.get(shape, ())
        for skeleton in known:
            if skeleton.fits(contents):
                return skeleton.fill(contents)
        laid = self._lay(conversation)
        failures = self._failures.get(shape, 0)
        if len(known) < _KNOWN_PER_SHAPE and failures < _FAILURES_PER_SHAPE:
            skeleton = self._learn(conversation, contents, *laid)
            if skeleton is None:
                self._failures[shape] = failures + 1
            else:
                self._known.setdefault(shape, []).append(skeleton)
        return laid

    def _shape(self, conversation: Conversation) -> Shape | None:
        """What two conversations must share to have one skeleton; None where there is more to them than roles and contents."""
        if self._template is None or conversation.tools:
            return None
        shape = [str(conversation.variant)]
        for message in conversation.messages:
            if not message.is_plain or not message.content or message.content.isspace():
                return None
            shape.append(message.role)
        return tuple(shape)

    def _learn(self, conversation: Conversation, contents: list[str], text: str, spans: Placed) -> Skeleton | None:
        asked: list[Condition] = []
        messages = [
            {"role": message.role, "content": _Content(number, contents, asked)}
            for number, message in enumerate(conversation.messages)
        ]
        try:
            pieces = self._pieces(messages, conversation.variant)
        except (Inspected, Refused, TemplateLimit, jinja2.TemplateError):
            return None
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError):
            return None  # a built-in function does not take a stand-in: nothing is known then
        texts = _filled(pieces, contents)
        if "".join(texts) != text or {piece[0] for piece in pieces if not isinstance(piece, str)} != set(
            range(len(contents))
        ):
            return None
        starts = [0, *accumulate(map(len, texts))]
        placed: list[tuple[tuple[int, int], tuple[int, int], int]] = []
        for start, end, message in spans:
            first, last = _place(starts, start), _place(starts, end)
            if any(into and not isinstance(pieces[piece], str) for piece, into in (first, last) if piece < len(pieces)):
                return None  # within a content: where depends on what it says
            placed.append((first, last, message))
        return Skeleton(pieces, tuple(dict.fromkeys(asked)), tuple(placed))

    def _pieces(self, messages: list[dict[str, Any]], variant: int) -> tuple[str | tuple[int, bool], ...]:
        assert self._template is not None
        self._environment.start()
        variables = {**self._variables, "variant": variant} if self._variants else self._variables
        text = "".join(
            self._template.generate(
                messages=messages, tools=None, documents=None, add_generation_prompt=False, **variables
            )
        )
        pieces: list[str | tuple[int, bool]] = []
        fixed: list[str] = []
        for character in text:
            if _FIRST_MARK <= ord(character) <= _LAST_MARK:
                if fixed:
                    pieces.append("".join(fixed))
                    fixed = []
                number, stripped = divmod(ord(character) - _FIRST_MARK, 2)
                pieces.append((number, bool(stripped)))
            else:
                fixed.append(character)
        return (*pieces, "".join(fixed)) if fixed else tuple(pieces)


def _place(starts: list[int], at: int) -> tuple[int, int]:
    """(piece, characters into it) of a place in the text; a border belongs to the piece that begins there."""
    piece = bisect_right(starts, at) - 1
    return piece, at - starts[piece]
