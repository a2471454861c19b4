"""One turn of a chat, whatever its file calls its parts, becomes a Message."""

import difflib
from typing import Any

from dstune.data.conversation import Message, Refused
from dstune.data.strict_json import kind, parse

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
_WEIGHT_KEYS = ("weight", "loss_weight", "train", "loss")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_TURN_KEYS = {"role", "from", "content", "value"}


def text(value: Any, where: str) -> str:
    """`value`, which must be a string already: numbers and dates never turn into text on the quiet."""
    if not isinstance(value, str):
        raise Refused(
            "non_text_content", f"{where} holds {kind(value)}; content is always a string: write it in quotes"
        )
    return value


def to_messages(turns: Any, where: str) -> list[Message]:
    """The turns of a `messages` or `conversations` list; a table's cell may spell it as JSON."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = parse(turns.encode("utf-8"))
    if not isinstance(turns, list) or not turns:
        raise Refused(
            "no_turns", f"{where} holds {kind(turns) if turns != [] else 'an empty list'}; expected a list of turns"
        )
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        place = f"{where}[{number}]"
        if not isinstance(turn, dict):
            raise Refused("bad_turn", f"{place} is {kind(turn)}; expected an object with `role` and `content`")
        if "human" in turn and "assistant" in turn and not _TURN_KEYS & turn.keys():
            messages.append(Message("user", text(turn["human"], f"{place}.human")))
            messages.append(answer(turn["assistant"], f"{place}.assistant"))
        else:
            messages.append(_message(turn, place))
    return messages


def answer(value: Any, where: str) -> Message:
    """An assistant's message of plain text; an empty one has nothing to teach and is refused."""
    content = text(value, where)
    if not content.strip():
        raise Refused("empty_answer", f"{where} is empty")
    return Message("assistant", content)


def _message(turn: dict[str, Any], place: str) -> Message:
    said = turn.get("role", turn.get("from"))
    if said is None:
        keys = ", ".join(sorted(turn))
        raise Refused("bad_turn", f"{place} has the keys {keys}; expected `role` and `content`, or `from` and `value`")
    role = _role(text(said, f"{place}.role"), place)
    content, reasoning, calls = _content(turn.get("content", turn.get("value")), place)
    if role == "call":
        role, content, calls = "assistant", "", [*calls, *_spelled_calls(content, place)]
    calls += tool_calls(turn.get("tool_calls") or turn.get("function_call"), place)
    for key in _REASONING_KEYS:
        if turn.get(key) is not None:
            reasoning = text(turn[key], f"{place}.{key}")
            break
    if role == "assistant" and not content.strip() and not calls and not reasoning:
        raise Refused("empty_answer", f"{place} is empty")
    if role != "assistant" and turn.get("content", turn.get("value")) is None:
        raise Refused("non_text_content", f"{place} has no content")
    return Message(
        role=role,
        content=content,
        tool_calls=tuple(calls),
        name=_optional(turn, "name", place),
        tool_call_id=_optional(turn, "tool_call_id", place),
        reasoning=reasoning,
        train=_train(turn, role, place),
    )


def _optional(turn: dict[str, Any], key: str, place: str) -> str | None:
    return None if turn.get(key) is None else text(turn[key], f"{place}.{key}")


def _role(said: str, place: str) -> str:
    """Our word for a role. One that we do not know is the template's business, unless it looks like a slip of the pen."""
    role = said.strip().lower()
    if role in _ROLES:
        return _ROLES[role]
    if near := difflib.get_close_matches(role, _ROLES, 1, cutoff=0.8):
        raise Refused("unknown_role", f"{place} has the role {said!r}; did you mean {near[0]!r}?")
    if not role:
        raise Refused("unknown_role", f"{place} has an empty role")
    return said


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
        held = part.get("text", part.get("value", part.get("thinking", part.get("reasoning"))))
        if said == "text":
            words.append(text(held, where))
        elif said in ("reasoning", "thinking"):
            thoughts.append(text(held, where))
        elif said == "tool_call":
            calls += _spelled_calls(text(held, where), where)
        else:
            raise Refused("non_text_content", f"{where} is of type {said!r}; dstune tunes on text")
    return "".join(words), "".join(thoughts) if thoughts else None, calls


def _spelled_calls(spelled: str, place: str) -> list[dict[str, Any]]:
    """Tool calls that a file writes as JSON in a turn's text: one object or a list of them."""
    try:
        value = parse(spelled.encode("utf-8"))
    except Refused as error:
        raise Refused("bad_tool_call", f'{place}: {error.detail}; expected {{"name": …, "arguments": …}}') from None
    calls = tool_calls(value, place)
    if not calls:
        raise Refused("bad_tool_call", f"{place}: no call in it")
    return calls


def tool_calls(value: Any, place: str) -> list[dict[str, Any]]:
    """Calls in the one form that chat templates read: `{"type": "function", "function": {"name": str, "arguments": dict}}`."""
    if not value:
        return []
    calls: list[dict[str, Any]] = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused("bad_tool_call", f'{place}: expected {{"name": …, "arguments": …}}, here stands {kind(call)}')
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = _arguments(arguments, place)
        if not isinstance(arguments, dict):
            raise Refused("bad_tool_call", f"{place}: the arguments are {kind(arguments)}; expected an object")
        made: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        if isinstance(call.get("id"), str):
            made["id"] = call["id"]
        calls.append(made)
    return calls


def _arguments(spelled: str, place: str) -> Any:
    if not spelled.strip():
        return {}
    try:
        return parse(spelled.encode("utf-8"))
    except Refused as error:
        raise Refused("bad_tool_call", f"{place}: its arguments: {error.detail}") from None


def tools(value: Any) -> tuple[dict[str, Any], ...]:
    """The `tools` of a record: a list of JSON schemas, or the same spelled as a JSON string."""
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            value = parse(value.encode("utf-8"))
        except Refused as error:
            raise Refused("bad_tools", error.detail) from None
    if not value:
        return ()
    made: list[dict[str, Any]] = []
    for tool in value if isinstance(value, list) else [value]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            made.append({"type": "function", "function": tool} if function is tool else tool)
        else:
            raise Refused("bad_tools", f"{kind(tool)} among the tools; expected an object with `name` and `parameters`")
    return tuple(made)


def _train(turn: dict[str, Any], role: str, place: str) -> bool | None:
    """Whether the file itself says that this turn is a target, or is none."""
    given = [turn[key] for key in _WEIGHT_KEYS if turn.get(key) is not None]
    if not given:
        return None
    weight = given[0]
    if weight not in (0, 1):
        raise Refused(
            "unsupported_weight", f"{place} weighs {weight!r}; a token is a target (1) or not (0), nothing between"
        )
    return bool(weight)
