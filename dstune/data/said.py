"""What a message says, and how a template may write it: the parts that a rendering must show, thoughts apart from the answer."""

import json
import re
from collections.abc import Iterator

from dstune.data.annotate import core
from dstune.data.conversation import Message

_THINK = re.compile(r"</?think>")


def spellings(said: str) -> tuple[str, str]:
    """As it is, and as JSON writes it within a string."""
    return said, json.dumps(said, ensure_ascii=False)[1:-1]


def must_appear(message: Message) -> list[str]:
    """What a rendering cannot do without: the content (of an assistant that thinks aloud, what follows its thoughts) and calls."""
    content = message.content
    if message.role == "assistant":
        content = spoken(content)
    said = [one.strip() for one in (content, message.input or "") if one.strip()]
    return said + [call["function"]["name"] for call in message.tool_calls]


def thinks(message: Message) -> bool:
    """Whether this is an answer with thoughts before it."""
    return message.role == "assistant" and (message.reasoning is not None or "</think>" in message.content)


def thoughts(message: Message) -> list[str]:
    """What an assistant thinks aloud before the answer, in a field of its own or between tags; what it says before that, too."""
    tagged = _THINK.split(message.content)[:-1] if message.role == "assistant" and "</think>" in message.content else []
    return [said.strip() for said in (message.reasoning or "", *tagged) if said.strip()]


def spoken(content: str) -> str:
    """An answer without the thoughts before it, which templates move or leave out."""
    return content.rpartition("</think>")[2]


def spoken_core(value: str, owner: int) -> Iterator[tuple[int, int]]:
    """`core` of an answer without its thoughts."""
    answer = spoken(value)
    offset = len(value) - len(answer)
    for start, end in core(answer, owner):
        yield offset + start, offset + end
