"""One turn of a chat, whatever its file calls its parts, becomes a Message."""

import difflib
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dstune.data.calls import spelled_calls, tool_calls
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.strict_json import kind, parse

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "usr": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "function_call": "call",
    "tool_call": "call",
}
_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
    "function_tag": "call",
}
_WEIGHT_KEYS = ("weight", "loss_weight", "train", "training", "loss")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking", "thoughts", "thought")
_PAIR_KEYS = (("human", "assistant"), ("user", "assistant"), ("input", "output"))
"""A turn that holds a question and its answer."""
_UNREAD_KEYS = (
    *("image", "images", "video", "videos", "audio", "audios", "objects"),
    *("train_detail", "training_detail"),  # a part of a turn as target, by characters
)


@dataclass(frozen=True)
class TurnNames:
    """What a source calls the parts of a turn and its speakers."""

    role: tuple[str, ...] = ("role", "from")
    content: tuple[str, ...] = ("content", "value", "text")
    roles: Mapping[str, str] | None = None
    """Speakers that the user or a registry names, before the usual ones."""

    @functools.cached_property
    def plain_keys(self) -> dict[tuple[str, ...], tuple[str, str]]:
        """The keys of a turn that holds a role and a text and nothing else, in either order: where its role and its text are."""
        pairs = [(role, content) for role in self.role for content in self.content]
        return {order: pair for pair in pairs for order in (pair, pair[::-1])}

    @functools.cached_property
    def plain_roles(self) -> dict[str, str]:
        """Our words for roles whose text is a text."""
        return {said: role for said, role in (self.roles or _ROLES).items() if role != "call"}

    @classmethod
    def of(cls, columns: Mapping[str, str]) -> "TurnNames":
        """The `role_tag`, `content_tag`, `user_tag`, `assistant_tag`, … among `columns`."""
        roles = {columns[tag]: role for tag, role in _TAGS.items() if tag in columns}
        role, content = columns.get("role_tag"), columns.get("content_tag")
        return cls((role,) if role else cls.role, (content,) if content else cls.content, {**_ROLES, **roles})

    @staticmethod
    def tags() -> frozenset[str]:
        """The keys of `columns` that name parts of turns rather than columns."""
        return frozenset(("role_tag", "content_tag", *_TAGS))


USUAL_NAMES = TurnNames(roles=_ROLES)


def plain(role: str, content: str, context: str | None = None) -> Message:
    """`Message(role, content, context=context)` in a sixth of the time: millions are made, and a frozen dataclass sets every default."""
    message = Message.__new__(Message)
    fields = message.__dict__
    fields["role"] = role
    fields["content"] = content
    if context is not None:
        fields["context"] = context
    return message


def conversation(messages: Iterable[Message], tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    """`Conversation(messages, tools)`, likewise."""
    made = Conversation.__new__(Conversation)
    made.__dict__["messages"] = tuple(messages)
    if tools:
        made.__dict__["tools"] = tools
    return made


def text(value: Any, where: str) -> str:
    """`value`, which must be a string already: numbers and dates never turn into text on the quiet."""
    if not isinstance(value, str):
        raise Refused(
            "non_text_content", f"{where} holds {kind(value)}; content is always a string: write it in quotes"
        )
    return value


def to_messages(turns: Any, where: str, names: TurnNames = USUAL_NAMES) -> list[Message]:
    """The turns of a `messages` or `conversations` list; a table's cell may spell it as JSON."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parse(turns.encode("utf-8"), where)
    if not isinstance(turns, list) or not turns:
        raise Refused(
            "no_turns", f"{where} holds {kind(turns) if turns != [] else 'an empty list'}; expected a list of turns"
        )
    messages: list[Message] = []
    plain_keys, plain_roles = names.plain_keys, names.plain_roles
    for number, turn in enumerate(turns):
        if type(turn) is dict and (keys := plain_keys.get(tuple(turn))):  # most are so, and this loop is the hot one
            said, content = turn[keys[0]], turn[keys[1]]
            role = plain_roles.get(said) if type(said) is str else None
            if role and type(content) is str and content and not content.isspace():
                messages.append(plain(role, content))
                continue
        messages += _turn(turn, f"{where}[{number}]", names)
    return messages


def question(value: Any, where: str) -> Message:
    """A user's message of plain text; after an empty one the model would learn to answer nothing, so it is refused."""
    content = text(value, where)
    if not content or content.isspace():
        raise Refused("empty_prompt", f"{where} is empty")
    return plain("user", content)


def answer(value: Any, where: str) -> Message:
    """An assistant's message of plain text; an empty one has nothing to teach and is refused."""
    content = text(value, where)
    if not content or content.isspace():
        raise Refused("empty_answer", f"{where} is empty")
    return plain("assistant", content)


def _turn(turn: Any, place: str, names: TurnNames) -> list[Message]:
    if not isinstance(turn, dict):
        raise Refused("bad_turn", f"{place} is {kind(turn)}; expected an object with `role` and `content`")
    for key in _UNREAD_KEYS:
        if turn.get(key):
            raise Refused(
                "unsupported_part", f"{place} has `{key}`, which dstune does not take; it tunes on whole texts"
            )
    if _first(turn, names.role) is None and _first(turn, names.content) is None:
        for asked, answered in _PAIR_KEYS:
            if asked in turn and answered in turn:
                system = turn.get("system")
                before = [plain("system", text(system, f"{place}.system"))] if system else []
                asks = question(turn[asked], f"{place}.{asked}")
                return [*before, asks, answer(turn[answered], f"{place}.{answered}")]
    return [_message(turn, place, names)]


def _first(turn: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


def _message(turn: dict[str, Any], place: str, names: TurnNames) -> Message:
    said, held = _first(turn, names.role), _first(turn, names.content)
    if said is None:
        keys = ", ".join(sorted(turn))[:200]
        expected = "`role` and `content`, or `from` and `value`"
        raise Refused("bad_turn", f"{place} has the keys {keys}; expected {expected}")
    role = _role(text(said, f"{place}.role"), place, names)
    if role == "call":
        role = "assistant"
        content, reasoning, calls = _call(held, place)
    else:
        content, reasoning, calls = _content(held, place)
    calls += tool_calls(turn.get("tool_calls") or turn.get("function_call"), place)
    for key in _REASONING_KEYS:
        if turn.get(key) is not None:
            reasoning = text(turn[key], f"{place}.{key}")
            break
    if role == "assistant" and not content.strip() and not calls and not reasoning:
        raise Refused("empty_answer", f"{place} is empty")
    if role != "assistant" and held is None:
        raise Refused("non_text_content", f"{place} has no content")
    if role == "user" and not content.strip():
        raise Refused("empty_prompt", f"{place} is empty")
    return Message(
        role=role,
        content=content,
        tool_calls=tuple(calls),
        name=_optional(turn, "name", place),
        tool_call_id=_optional(turn, "tool_call_id", place),
        reasoning=reasoning,
        train=_train(turn, place),
    )


def _optional(turn: dict[str, Any], key: str, place: str) -> str | None:
    return None if turn.get(key) is None else text(turn[key], f"{place}.{key}")


def _role(said: str, place: str, names: TurnNames) -> str:
    """Our word for a role. One that nobody knows is refused: a template might render it as anything, or as nothing."""
    roles = names.roles or _ROLES
    role = roles.get(said) or roles.get(said.strip().lower())
    if role is not None:
        return role
    if not said.strip():
        raise Refused("unknown_role", f"{place} has an empty role")
    if near := difflib.get_close_matches(said.strip().lower()[:40], roles, 1, cutoff=0.8):
        raise Refused("unknown_role", f"{place} has the role {said[:40]!r}; did you mean {near[0]!r}?")
    named_by = f"say who that is, for instance `columns: {{assistant_tag: {said[:40]}}}`"
    raise Refused("unknown_role", f"{place} has the role {said[:40]!r}; {named_by}")


def _content(value: Any, place: str) -> tuple[str, str | None, list[dict[str, Any]]]:
    """Text, reasoning and tool calls of a content: a string, or typed parts laid end to end."""
    if value is None:
        return "", None, []
    if not isinstance(value, list):
        return text(value, f"{place}.content"), None, []
    words: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for number, part in enumerate(value):
        where = f"{place}.content[{number}]"
        if isinstance(part, str):
            words.append(part)
            continue
        if not isinstance(part, dict):
            raise Refused("bad_turn", f"{where} is {kind(part)}; expected a typed part")
        said = part.get("type", "text")
        held = _first(part, ("text", "value", "thinking", "reasoning", "content"))
        if said in ("text", "input_text", "output_text"):
            words.append(text(held, where))
        elif said in ("reasoning", "thinking"):
            thoughts.append(_content(held, where)[0] if isinstance(held, list) else text(held, where))
        elif said == "tool_call":
            calls += spelled_calls(text(held, where), where)
        else:
            raise Refused("non_text_content", f"{where} is of type {str(said)[:40]!r}; dstune tunes on text")
    return "".join(words), "".join(thoughts) if thoughts else None, calls


def _call(value: Any, place: str) -> tuple[str, str | None, list[dict[str, Any]]]:
    """`_content` of a turn that is a tool call: an object, or what `_content` takes with the call spelled as JSON."""
    if isinstance(value, dict):
        return "", None, tool_calls(value, place)
    spelled, reasoning, calls = _content(value, place)
    return "", reasoning, [*calls, *spelled_calls(spelled, place)]


def _train(turn: dict[str, Any], place: str) -> bool | None:
    """Whether the file itself says that this turn is a target, or is none."""
    given = [turn[key] for key in _WEIGHT_KEYS if turn.get(key) is not None]
    for weight in given:
        if weight not in (0, 1):
            whole = "a token is a target (the number 1) or not (0), nothing between"
            shown = kind(weight) if isinstance(weight, list | dict) else repr(weight)[:40]
            raise Refused("unsupported_weight", f"{place} weighs {shown}; {whole}")
        if weight != given[0]:
            raise Refused("unsupported_weight", f"{place} has weights that contradict each other")
    return bool(given[0]) if given else None
