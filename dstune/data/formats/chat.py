"""Records that hold turns: OpenAI's `messages`, ShareGPT's `conversations`."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dstune.data import turns
from dstune.data.conversation import Refused
from dstune.data.formats.record import SYSTEM_KEYS, TOOLS_KEYS, Parts, Settings, listed, present, tools_of, with_system
from dstune.data.turns import TurnNames

CHAT_KEYS = ("messages", "conversations", "conversation")


def chat_key(keys: Collection[str], settings: Settings) -> str:
    """The key that holds the turns, empty where there is none. Raises Refused where there are several."""
    found = present(keys, CHAT_KEYS)
    if len(found) > 1 and "messages" in settings.named:
        return "messages"
    if len(found) > 1:
        raise Refused("ambiguous_format", f"turns under {listed(found)}; name one by `columns: {{messages: …}}`")
    return found[0] if found else ""


@dataclass(frozen=True)
class Chat:
    """Reads the turns under `key`."""

    key: str
    names: TurnNames
    system: tuple[str, ...]
    tools: tuple[str, ...]

    @classmethod
    def of(cls, keys: Collection[str], key: str, settings: Settings) -> "Chat":
        return cls(key, settings.names, present(keys, SYSTEM_KEYS), present(keys, TOOLS_KEYS))

    def __call__(self, record: dict[str, Any]) -> Parts:
        messages = turns.to_messages(record[self.key], self.key, self.names)
        if self.system:
            messages = with_system(record, self.system, messages)
        return [turns.conversation(messages, tools_of(record, self.tools) if self.tools else ())]
