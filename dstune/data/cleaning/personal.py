"""Personal data and secrets: flagged, masked, or a reason to drop a conversation."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

from dstune.data.cleaning.identifiers import KINDS, Kind, mask_kind
from dstune.data.cleaning.step import Step, edited_message
from dstune.data.conversation import Conversation, Message


class PersonalData(Step):
    """Finds e-mail addresses, phone numbers, credit cards (Luhn), IBANs (mod 97), public IP addresses, API keys and private keys, in
    every turn, its reasoning and tool calls, and in the descriptions of tools. Flags them unless told to mask or drop.

    Patterns are narrow: example.com, private networks, version numbers, dates, ISBNs and formulas are not taken; a number without
    any sign of what it is is not either. What it does not find may still be there.
    """

    name: ClassVar[str] = "personal_data"
    action: Literal["flag", "mask", "drop"] = "flag"
    """`mask` writes `[EMAIL]`, `[PHONE]`, `[CREDIT_CARD]`, `[IBAN]`, `[IP]`, `[API_KEY]`, `[PRIVATE_KEY]` in their place."""
    kinds: tuple[Kind, ...] = tuple(KINDS)
    """What is looked for."""

    def flags(self, conversation: Conversation) -> tuple[str, ...]:
        if self.action != "flag":
            return ()
        return tuple(f"{self.name}_{kind}" for kind in self._found(conversation))

    def apply(self, conversation: Conversation) -> Conversation:
        if self.action == "mask":
            return self._masked(conversation)
        if self.action == "drop" and (found := self._found(conversation)):
            raise self.refuse(f"holds {', '.join(found)}")
        return conversation

    def _found(self, conversation: Conversation) -> list[str]:
        found: dict[str, None] = {}

        def look(text: str) -> str:
            found.update(dict.fromkeys(self._in_text(text)))
            return text

        _everywhere(conversation, look)
        return [kind for kind in self._looked_for() if kind in found]

    def _looked_for(self) -> list[Kind]:
        return [kind for kind in KINDS if kind in self.kinds]

    def _in_text(self, text: str) -> Iterator[Kind]:
        """Every kind in the text; each is taken out before the next is looked for, as when masking."""
        for kind in self._looked_for():
            masked = mask_kind(text, kind)
            if masked is not text:
                yield kind
            text = masked

    def _masked(self, conversation: Conversation) -> Conversation:
        def mask(text: str) -> str:
            for kind in self._looked_for():
                text = mask_kind(text, kind)
            return text

        return _everywhere(conversation, mask)


def _everywhere(conversation: Conversation, edit: Callable[[str], str]) -> Conversation:
    """With `edit` over every text that is learned from or shown: turns, reasoning, tool calls' arguments, tools. The same object where
    nothing changed."""
    messages = tuple(_in_message(message, edit) for message in conversation.messages)
    tools = tuple(_in_value(tool, edit) for tool in conversation.tools)
    same = all(
        new is old for new, old in zip((*messages, *tools), (*conversation.messages, *conversation.tools), strict=True)
    )
    return conversation if same else replace(conversation, messages=messages, tools=tools)


def _in_message(message: Message, edit: Callable[[str], str]) -> Message:
    said = edited_message(message, edit)
    calls = tuple(_in_value(call, edit) for call in message.tool_calls)
    return said if all(map(_same, calls, message.tool_calls)) else replace(said, tool_calls=calls)


def _same(one: Any, other: Any) -> bool:
    return one is other


def _in_value(value: Any, edit: Callable[[str], str]) -> Any:
    """Every text in a value of JSON, keys aside; the same object where nothing changed."""
    if isinstance(value, str):
        return edit(value)
    if isinstance(value, dict):
        items = {key: _in_value(item, edit) for key, item in value.items()}
        return value if all(items[key] is value[key] for key in items) else items
    if isinstance(value, list):
        items = [_in_value(item, edit) for item in value]
        return value if all(map(_same, items, value)) else items
    return value
