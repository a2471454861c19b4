"""What a record is, found by its keys, and the conversations that it holds. One file per family.

The family of a set of keys is found once; what cannot be told with certainty is refused, with the keys and what to write.
"""

from functools import lru_cache
from typing import Any

from dstune.config.schema import Source
from dstune.data.conversation import Conversation, Refused
from dstune.data.formats.detect import Converter

__all__ = ["converter", "to_conversations", "to_parts"]


def to_parts(value: dict[str, Any], source: Source) -> list[Conversation | Refused]:
    """The conversations in one record, in order; a part of a tree or a task that is none is a Refused in its place.

    Raises Refused where the record as a whole is not understood.
    """
    return _converter(source.format, tuple(source.columns.items()), source.use, source.paths)(value)


def to_conversations(value: dict[str, Any], source: Source) -> list[Conversation]:
    """`to_parts`, raising Refused for the first part that is none."""
    made: list[Conversation] = []
    for part in to_parts(value, source):
        if isinstance(part, Refused):
            raise part
        made.append(part)
    return made


def converter(source: Source) -> Converter:
    """`to_parts` for one source: what to hold on to where many records follow each other."""
    return _converter(source.format, tuple(source.columns.items()), source.use, source.paths)


@lru_cache(maxsize=64)
def _converter(format_: str, columns: tuple[tuple[str, str], ...], use: str | None, paths: str) -> Converter:
    return Converter(format_, dict(columns), use, paths)
