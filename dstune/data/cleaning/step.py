"""What a cleaning step is, and how steps reach the texts of a conversation."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar

from dstune.config.schema import Section
from dstune.data.conversation import Conversation, Message, Refused

Edit = Callable[[str], str]

_CODE = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1|\Z)", re.DOTALL | re.MULTILINE)
"""A fenced block, up to the end of the text where it is never closed."""


class Step(Section):
    """One cleaning step with its settings. `apply` gives the conversation back, or raises Refused to drop it.

    A step that only wants to point at something names it in `flags`. Both are pure functions of the conversation.
    """

    name: ClassVar[str]

    def apply(self, conversation: Conversation) -> Conversation:
        raise NotImplementedError

    def flags(self, conversation: Conversation) -> tuple[str, ...]:
        """What is pointed at in the conversation, as it was before `apply`."""
        return ()

    def described(self) -> dict[str, Any]:
        """All that decides what this step does, for the manifest: its settings, and the version of what it asks."""
        return self.model_dump(mode="json")

    def refuse(self, detail: str) -> Refused:
        """The reason by which this step drops a conversation."""
        return Refused(f"clean_{self.name}", detail)


def edited(conversation: Conversation, edit: Edit) -> Conversation:
    """With `edit` over every turn's content and reasoning; the same object where nothing changed."""
    messages = tuple(edited_message(message, edit) for message in conversation.messages)
    same = all(new is old for new, old in zip(messages, conversation.messages, strict=True))
    return conversation if same else replace(conversation, messages=messages)


def edited_message(message: Message, edit: Edit) -> Message:
    """With `edit` over content and reasoning; an instruction and its input are edited apart. The same object where nothing changed."""
    reasoning = None if message.reasoning is None else edit(message.reasoning)
    context = message.context
    if context is None:
        content = edit(message.content)
    else:
        instruction = edit(message.content.removesuffix(f"\n{context}"))
        context = edit(context) or None
        content = instruction if context is None else f"{instruction}\n{context}"
    if content == message.content and reasoning == message.reasoning:
        return message
    return replace(message, content=content, context=context, reasoning=reasoning)


def outside_code(text: str, edit: Edit) -> str:
    """`text` with `edit` over what stands outside fenced blocks of code."""
    if "```" not in text and "~~~" not in text:
        return edit(text)
    parts: list[str] = []
    end = 0
    for block in _CODE.finditer(text):
        parts += [edit(text[end : block.start()]), block.group()]
        end = block.end()
    return "".join([*parts, edit(text[end:])])


def without_code(text: str) -> str:
    """`text` without its fenced blocks."""
    return _CODE.sub("", text) if "```" in text or "~~~" in text else text


def answers(conversation: Conversation) -> Iterator[str]:
    """What the assistant says, turn by turn, or a document; turns that only call tools say nothing and are left out."""
    for message in conversation.messages:
        if message.role in ("assistant", "document") and (message.content or not message.tool_calls):
            yield message.content


def questions(conversation: Conversation) -> Iterator[str]:
    """What the user says, turn by turn."""
    for message in conversation.messages:
        if message.role == "user":
            yield message.content
