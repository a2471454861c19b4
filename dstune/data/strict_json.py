"""JSON as the standard has it: what Python's own reader lets through (NaN, duplicate keys, lone surrogates, bombs) is refused."""

import json
import math
import re
from typing import Any

from pydantic_core import from_json

from dstune.data.conversation import Refused

MAX_DEPTH = 100
"""Brackets within brackets. Real tool schemas stay below 20; Python's reader overflows its stack at some thousands."""

_UNSURE = object()
_NEVER = -(1 << 62)
_LARGE = 1 << 63
_KEY_END = re.compile(rb'"[ \t\r\n]*:')
_PLAIN_KEY_END = re.compile(rb'(?<!\\)"[ \t\r\n]*:')
_BACKSLASH = ord("\\")
_STRING_OR_BRACKET = re.compile(rb'["\[\]{}]')
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def parse(raw: bytes, what: str = "the record") -> Any:
    """The value that `raw`, which is `what`, spells in UTF-8 JSON. Raises Refused with what is wrong and at which byte or character."""
    value = _quick(raw)
    return _careful(raw, what) if value is _UNSURE else value


def _quick(raw: bytes) -> Any:
    """The value by pydantic's reader, which refuses all that JSON is not, or `_UNSURE` where it may have let something through.

    It keeps the last of two equal keys. There were none if as many keys came out as quotes with a colon behind them went in: each
    key has one, and so may a text (`\\":`), but then there are more.
    """
    try:
        value = from_json(raw, allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        return _UNSURE
    keys = _num_keys(value, 1)
    if keys == len(_KEY_END.findall(raw)):
        return value
    # No key ends with a backslash: then the quotes in texts, escaped all of them, can be told from those of keys.
    if b'\\\\"' not in raw and keys == len(_PLAIN_KEY_END.findall(raw)):
        return value
    return _UNSURE


def _num_keys(value: Any, depth: int) -> int:
    """Keys of all objects in `value`; far below zero where a number or the depth is beyond what `_careful` takes without a look."""
    if isinstance(value, dict | list):
        if depth > MAX_DEPTH:
            return _NEVER
        items = value.values() if isinstance(value, dict) else value
        keys = len(value) if isinstance(value, dict) else 0
        for item in items:
            if type(item) is not str:
                keys += _num_keys(item, depth + 1)
        return keys
    if type(value) is float:
        return 0 if math.isfinite(value) else _NEVER
    if type(value) is int:
        return 0 if -_LARGE < value < _LARGE else _NEVER
    return 0


def _careful(raw: bytes, what: str = "the record") -> Any:
    """`parse`, by Python's reader, which says what is wrong and where."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused("invalid_utf8", f"byte {error.start + 1} of {what} (0x{raw[error.start]:02x})") from None
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH:
        _check_depth(raw)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise Refused("invalid_json", f"{error.msg}, character {error.pos + 1} of {what}") from None
    except (ValueError, RecursionError) as error:
        raise Refused("invalid_json", str(error)) from None
    if _SURROGATE_ESCAPE.search(text):
        _check_surrogates(value)
    return value


def parse_object(raw: bytes) -> dict[str, Any]:
    """`parse`, for a record: anything but an object is refused."""
    value = parse(raw)
    if not isinstance(value, dict):
        raise Refused("not_an_object", f"a record is an object {{…}}; here stands {kind(value)}")
    return value


def kind(value: Any) -> str:
    """What a person calls this value: for messages."""
    names = {
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def string_end(raw: bytes, at: int) -> int:
    """The place behind the quote that closes the string whose text starts at `at`; -1 where `raw` ends before it."""
    while (quote := raw.find(b'"', at)) >= 0:
        backslash = quote
        while backslash > at and raw[backslash - 1] == _BACKSLASH:
            backslash -= 1
        if (quote - backslash) % 2 == 0:
            return quote + 1
        at = quote + 1
    return -1


def _check_depth(raw: bytes) -> None:
    depth = at = 0
    while found := _STRING_OR_BRACKET.search(raw, at):
        at, byte = found.end(), found.group()
        if byte == b'"':
            at = string_end(raw, at)
            if at < 0:
                return
        elif byte in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise Refused("too_deep", f"more than {MAX_DEPTH} brackets within each other")
        else:
            depth -= 1


def _check_surrogates(value: Any) -> None:
    if isinstance(value, str):
        if found := _SURROGATE.search(value):
            raise Refused("lone_surrogate", f"\\u{ord(found.group()):04x} is half a character")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_surrogates(key)
            _check_surrogates(item)
    elif isinstance(value, list):
        for item in value:
            _check_surrogates(item)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise Refused("duplicate_key", f"{twice[:80]!r} stands twice in one object")
    return value


def _constant(name: str) -> Any:
    raise Refused("not_a_number", f"{name} is not JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Refused("not_a_number", f"{digits[:40]} is beyond what a number can hold")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
