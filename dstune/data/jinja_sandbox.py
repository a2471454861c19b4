"""Chat templates, compiled and rendered as transformers does it, with limits: a template is code that came with a model.

The environment (immutable sandbox, `trim_blocks`, loop controls, `{% generation %}`, `raise_exception`, `tojson`,
`strftime_now`) gives the same text as `apply_chat_template`; tests compare them. Beyond that, work and size are bounded.
"""

import json
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

MAX_TEXT = 64 << 20
"""Characters of one rendered conversation, and of any text that a template multiplies."""
MAX_ARGUMENT = 10_000_000
"""The largest number that a template may give to a function."""
MAX_SECONDS = 20
"""For one conversation; enforced where rendering runs on a process's main thread."""

_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)")


class Rendered(NamedTuple):
    """A conversation as text, and the `{% generation %}` blocks in it as (start, end) characters, end exclusive."""

    text: str
    generation: list[tuple[int, int]]


class TemplateLimit(Exception):
    """A template takes too long or writes too much."""


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Adds size limits to the operators that make long texts out of short ones."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if isinstance(left, str) and isinstance(right, str) and len(left) + len(right) > MAX_TEXT:
                raise TemplateLimit(f"a text above {MAX_TEXT} characters")
        elif operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and isinstance(other, int) and len(one) * other > MAX_TEXT:
                    raise TemplateLimit(f"a text above {MAX_TEXT} characters")
        elif operator == "**" and isinstance(right, (int, float)) and abs(right) > 64:
            raise TemplateLimit("a power above 64")
        elif operator == "%" and isinstance(left, str) and _WIDE.search(left):
            raise TemplateLimit("a very wide field")
        return super().call_binop(context, operator, left, right)

    def call(self, context: jinja2.runtime.Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore
        """Methods such as `ljust` and functions such as `range` take sizes: none needs a large one."""
        if any(isinstance(argument, int) and argument > MAX_ARGUMENT for argument in args):
            raise TemplateLimit(f"a number above {MAX_ARGUMENT} given to a function")
        return super().call(context, obj, *args, **kwargs)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: notes where its text stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as a plain set)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body)
        block.set_lineno(line)
        return block

    def mark(self, caller: Callable[[], str]) -> str:
        written = caller()
        environment = self.environment
        assert isinstance(environment, Environment)
        environment.blocks.append((environment.written, environment.written + len(written)))
        return written


class Environment(_Sandbox):
    """What templates run in."""

    written: int = 0
    """Characters that the template has put out so far."""
    blocks: list[tuple[int, int]]

    def start(self) -> None:
        """Before each rendering."""
        self.written, self.blocks = 0, []


class _TemplateDict:
    """`dict` for templates without the type behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(jinja2.utils.Namespace):
    """`namespace` without attributes that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805, RUF100 (so that `namespace(self=…)` works, as in jinja2)
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace's attribute may not start with an underscore: {name!r}")


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


E = TypeVar("E", bound=Environment)


def template_environment(kind: type[E], now: datetime) -> E:
    """An environment with all that chat templates use; `now` is what `strftime_now` tells."""
    environment = kind(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = _tojson
    given: dict[str, Any] = {
        "raise_exception": _raise_exception,
        "strftime_now": now.strftime,
        "dict": _TemplateDict(),
        "namespace": _TemplateNamespace,
    }
    environment.globals.update(given)
    environment.start()
    return environment


class ChatTemplate:
    """One compiled template. Not picklable: compile it where it is used."""

    def __init__(self, source: str, now: datetime) -> None:
        """Compile `source`; `now` is what `strftime_now` tells. Raises jinja2.TemplateSyntaxError."""
        environment = template_environment(Environment, now)
        self._environment = environment
        self._template = environment.from_string(source)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any],
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """The conversation's text. Raises jinja2.TemplateError (the template refuses) or TemplateLimit, or what it stumbles on."""
        environment = self._environment
        environment.start()
        pieces: list[str] = []
        with _time_limit():
            for piece in self._template.generate(
                messages=[_with_reasoning(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            ):
                pieces.append(piece)
                environment.written += len(piece)
                if environment.written > MAX_TEXT:
                    raise TemplateLimit(f"a text above {MAX_TEXT} characters")
        return Rendered("".join(pieces), environment.blocks)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Templates read thoughts as `reasoning_content`, gpt-oss's as `thinking`: give them both."""
    thoughts = message.get("reasoning_content")
    return message if thoughts is None else {"thinking": thoughts, **message}


@contextmanager
def _time_limit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TemplateLimit(f"more than {MAX_SECONDS} seconds for one conversation")

    before = signal.signal(signal.SIGALRM, stop)
    running = signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *running)
