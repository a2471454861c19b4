"""Which characters of a rendered conversation come from its author, and which the template wrote.

Every string of the conversation is put between two private characters, the conversation rendered once more, and the private
characters taken out again: what stood between them is the author's. That holds only where the text is otherwise the same as
without them (a template may look at what a content starts with), so the caller compares.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dstune.data.conversation import Conversation

TRUSTED_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
_SCHEMA_WORDS = frozenset({"function", "object", "string", "integer", "number", "boolean", "array", "null"})
_PLAIN_KEY = re.compile(r"[\w.$-]*")
_IDENTIFIERS = ("id", "tool_call_id")
_PLANES = (0x100000, 0xF0000)
"""Private use areas that the marks come from: a conversation that uses one itself is marked in the other."""
_PLANE_SIZE = 0xFFFE

Pieces = Callable[[str, int], Iterator[tuple[int, int]]]
"""Which parts of a string of a message (-1: a tool's schema) to mark, as (start, end)."""


class Range(NamedTuple):
    """Characters of the rendered text that come from the conversation."""

    start: int
    end: int
    """Exclusive."""
    message: int
    """The message's number, or -1 for a tool's schema."""


class Marks:
    """Puts marks into one conversation and finds them again in the text rendered from it."""

    def __init__(self, conversation: Conversation, pieces: Pieces) -> None:
        """Mark what `pieces` says of each string. Raises ValueError where there are more strings than marks."""
        self._pieces = pieces
        self._owners: list[int] = []
        self._plane = _free_plane(conversation)
        self.messages = [self._message(number, value) for number, value in enumerate(conversation.to_dicts())]
        self.tools = [self._value(tool, -1) for tool in conversation.tools] or None

    def _message(self, number: int, value: dict[str, Any]) -> dict[str, Any]:
        return {key: self._field(key, item, number) for key, item in value.items()}

    def _field(self, key: str, value: Any, owner: int) -> Any:
        if (key == "role" and value in TRUSTED_ROLES) or _is_identifier(key, value):
            return value
        return self._string(value, owner) if isinstance(value, str) else self._value(value, owner)

    def _value(self, value: Any, owner: int) -> Any:
        if isinstance(value, str):
            return value if value in _SCHEMA_WORDS else self._string(value, owner)
        if isinstance(value, dict):
            return {
                self._key(key, owner): item if _is_identifier(key, item) else self._value(item, owner)
                for key, item in value.items()
            }
        if isinstance(value, list):
            return [self._value(item, owner) for item in value]
        return value

    def _key(self, key: str, owner: int) -> str:
        return key if _PLAIN_KEY.fullmatch(key) else self._string(key, owner)

    def _string(self, value: str, owner: int) -> str:
        written, at = [], 0
        for start, end in self._pieces(value, owner):
            mark = self._plane + 2 * len(self._owners)
            if mark + 1 >= self._plane + _PLANE_SIZE:
                raise ValueError("more strings than marks")
            self._owners.append(owner)
            written += [value[at:start], chr(mark), value[start:end], chr(mark + 1)]
            at = end
        return "".join(written) + value[at:] if written else value

    def find(self, rendered: str, lenient: bool = False) -> tuple[str, list[Range]]:
        """The rendered text without marks, and the ranges. Raises ValueError where a mark has lost its partner.

        A `lenient` search makes an empty range of such a mark: what stands beside it may be the author's.
        """
        plain: list[str] = []
        ranges: list[Range] = []
        at = length = 0
        opened: tuple[int, int] | None = None
        for match in re.finditer(f"[{chr(self._plane)}-{chr(self._plane + _PLANE_SIZE - 1)}]", rendered):
            plain.append(rendered[at : match.start()])
            length += match.start() - at
            at = match.end()
            number, closes = divmod(ord(match.group()) - self._plane, 2)
            if not closes and opened is None:
                opened = number, length
            elif closes and opened is not None and opened[0] == number:
                ranges.append(Range(opened[1], length, self._owners[number]))
                opened = None
            elif lenient:
                if opened is not None:
                    ranges.append(Range(opened[1], opened[1], self._owners[opened[0]]))
                opened = None if closes else (number, length)
                if closes:
                    ranges.append(Range(length, length, self._owners[number]))
            else:
                raise ValueError("a mark has lost its partner")
        if opened is not None:
            if not lenient:
                raise ValueError("a mark has lost its partner")
            ranges.append(Range(opened[1], opened[1], self._owners[opened[0]]))
        plain.append(rendered[at:])
        return "".join(plain), ranges


def _is_identifier(key: str, value: Any) -> bool:
    """A call's id: some templates count its letters."""
    return key in _IDENTIFIERS and isinstance(value, str) and _PLAIN_KEY.fullmatch(value) is not None


def core(value: str, owner: int) -> Iterator[tuple[int, int]]:
    """The string without the blanks around it, so that a template that trims does the same with marks."""
    start = len(value) - len(value.lstrip())
    end = len(value.rstrip())
    if start < end:
        yield start, end


def _free_plane(conversation: Conversation) -> int:
    text = "".join(strings(conversation))
    for plane in _PLANES:
        if not re.search(f"[{chr(plane)}-{chr(plane + _PLANE_SIZE - 1)}]", text):
            return plane
    raise ValueError("the conversation uses every private character")


def strings(conversation: Conversation) -> Iterator[str]:
    """Every string in the conversation, keys of arguments and schemas among them."""
    for message in conversation.to_dicts():
        yield from _strings(message)
    for tool in conversation.tools:
        yield from _strings(tool)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
