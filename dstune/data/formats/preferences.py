"""Preference data: two answers to one prompt. Refused, unless the run file takes the preferred one (`use: chosen`)."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from dstune.data import turns
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.formats.chat import chat_key
from dstune.data.formats.pairs import PROMPT_KEYS, Pair, replies
from dstune.data.formats.record import (
    SYSTEM_KEYS,
    TOOLS_KEYS,
    Parts,
    Reader,
    Settings,
    listed,
    present,
    tools_of,
    with_system,
)

_CHOSEN, _REJECTED = ("chosen", "chosen_response"), ("rejected", "rejected_response", "rejected_messages")
_HINT = "`use: chosen` tunes on the preferred answer"


def is_preference(keys: Collection[str], settings: Settings) -> bool:
    """Whether a record compares answers. Columns that the user names as completion or messages are taken at their word."""
    if settings.format == "preference":
        return True
    if present(keys, _CHOSEN):
        return bool(present(keys, _REJECTED)) or settings.use is not None
    return bool(present(keys, _REJECTED[1:]))


def preferred(keys: Collection[str], settings: Settings) -> Reader | None:
    """How to read the preferred side; None where it stands as an ordinary record beside what was rejected (ms-swift).

    Raises Refused where the run file does not ask for it.
    """
    chosen = present(keys, _CHOSEN)
    if settings.use is None:
        what = listed((*chosen, *present(keys, _REJECTED)))
        raise Refused("preference_data", f"{what} are preferences, not instructions; {_HINT}")
    if not chosen and settings.format == "preference" and not present(keys, _REJECTED):
        raise Refused("unknown_format", f"the keys {listed(keys)}; expected `chosen` and `rejected`")
    return Preferred.of(keys, chosen[0], settings) if chosen else None


def without_rejected(keys: Collection[str], settings: Settings) -> tuple[list[str], Settings]:
    """What is left to find a family by where the preferred answer stands in an ordinary record."""
    format_ = "auto" if settings.format == "preference" else settings.format
    return [key for key in keys if key not in _REJECTED], replace(settings, format=format_)


def refuse_undesired(label: Any, settings: Settings) -> None:
    """Raises Refused for a record that its `label` (true or false) marks as a bad answer, or any such where none was asked for."""
    if not isinstance(label, bool):
        return
    if settings.use is None:
        raise Refused("preference_data", f"`label` says whether the answer is wanted; {_HINT}")
    if not label:
        raise Refused("rejected_answer", "`label` is false: an answer that is not wanted")


@dataclass(frozen=True)
class Preferred:
    """Reads the prompt and the answer under `chosen`."""

    settings: Settings
    chosen: str
    rejected: tuple[str, ...]
    chat: str
    """The key of earlier turns; empty where there are none."""
    pair: Pair | None
    """How the prompt is read where it is a text or a list; None where it stands in the answers."""
    system: tuple[str, ...]
    tools: tuple[str, ...]

    @classmethod
    def of(cls, keys: Collection[str], chosen: str, settings: Settings) -> "Preferred":
        chat = chat_key(keys, settings)
        pair = None
        if not chat and present(keys, PROMPT_KEYS):
            named = replace(settings, format="auto", named=settings.named | {"completion"})
            pair = Pair.of({*keys, "completion"} - {*_CHOSEN, *_REJECTED}, named)
        rejected = present(keys, _REJECTED)
        return cls(settings, chosen, rejected, chat, pair, present(keys, SYSTEM_KEYS), present(keys, TOOLS_KEYS))

    def __call__(self, record: dict[str, Any]) -> Parts:
        names = self.settings.names
        before = self._prompt(record)
        after = replies(record[self.chosen], self.chosen, names)
        if before == after:
            before = []
        elif before and before[-1].role == "assistant":
            raise Refused("ambiguous_format", f"the prompt ends with an answer, and `{self.chosen}` is another")
        elif before and _begins_with(after, before):
            after = after[len(before) :]
        elif before and after[0].role in ("system", "user"):
            if before[-1].content not in [message.content for message in after]:
                raise Refused("ambiguous_format", f"`{self.chosen}` begins with another prompt than the record's own")
            before = []
        if not before:
            before, after = self._shared(record, after)
        if not before:
            raise Refused(
                "unknown_format", f"`{self.chosen}` without a prompt; expected `prompt`, or turns that hold it"
            )
        if not after or after[-1].role != "assistant":
            raise Refused("empty_answer", f"`{self.chosen}` holds no answer")
        learnt = [replace(message, train=False) if message.role == "assistant" else message for message in before]
        messages = with_system(record, self.system, [*learnt, *after])
        return [Conversation(tuple(messages), tools_of(record, self.tools))]

    def _prompt(self, record: dict[str, Any]) -> list[Message]:
        if self.chat:
            return turns.to_messages(record[self.chat], self.chat, self.settings.names)
        if self.pair is None:
            return []
        asked = record[self.pair.prompt]
        if isinstance(asked, list):
            return turns.to_messages(asked, self.pair.prompt, self.settings.names)
        without = {**record, "completion": "-"}
        plain = replace(self.pair, answer="completion", system=(), tools=(), reasoning=())
        return list(plain.conversation(without).messages[:-1])

    def _shared(self, record: dict[str, Any], chosen: list[Message]) -> tuple[list[Message], list[Message]]:
        """A whole dialogue as answer: what both answers begin with is the prompt."""
        other = [
            replies(record[key], key, self.settings.names) for key in self.rejected if isinstance(record[key], list)
        ]
        last = len(chosen) - 1
        shared = 0
        while other and shared < min(last, len(other[0])) and chosen[shared] == other[0][shared]:
            shared += 1
        if not other:
            shared = last
        return chosen[:shared], chosen[shared:]


def _begins_with(messages: list[Message], before: list[Message]) -> bool:
    return messages[: len(before)] == before
