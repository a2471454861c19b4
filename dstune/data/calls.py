"""Tools, and calls of them, in the one form that chat templates read."""

from typing import Any

from dstune.data.conversation import Refused
from dstune.data.strict_json import kind, parse


def spelled_calls(spelled: str, place: str) -> list[dict[str, Any]]:
    """Tool calls that a file writes as JSON in a turn's text: one object or a list of them."""
    try:
        value = parse(spelled.encode("utf-8"), "the call")
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
    if isinstance(value, str):
        return spelled_calls(value, place)
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
        return parse(spelled.encode("utf-8"), "its arguments")
    except Refused as error:
        raise Refused("bad_tool_call", f"{place}: {error.detail}") from None


def tools(value: Any) -> tuple[dict[str, Any], ...]:
    """The `tools` of a record: a list of JSON schemas, or the same (as a whole or each) spelled as a JSON string."""
    value = _unspelled(value)
    if not value:
        return ()
    made: list[dict[str, Any]] = []
    for one in value if isinstance(value, list) else [value]:
        tool = _unspelled(one)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            made.append(tool if function is not tool else {"type": "function", "function": _untyped(tool)})
        else:
            raise Refused("bad_tools", f"{kind(tool)} among the tools; expected an object with `name` and `parameters`")
    return tuple(made)


def _untyped(tool: dict[str, Any]) -> dict[str, Any]:
    """A function's schema without the `type: function` that some files write beside its name."""
    return {key: item for key, item in tool.items() if key != "type"} if tool.get("type") == "function" else tool


def _unspelled(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse(value.encode("utf-8"), "the tools")
    except Refused as error:
        raise Refused("bad_tools", error.detail) from None
