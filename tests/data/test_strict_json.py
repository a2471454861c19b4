"""The quick way through JSON gives what the careful way gives, and lets nothing through that the careful one refuses."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstune.data import strict_json
from dstune.data.conversation import Refused

_TEXTS = st.text(
    st.one_of(st.sampled_from('"\\:/ {}[],\n\u2028é😀'), st.characters(exclude_categories=["Cs"])), max_size=8
)
_NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**80), 2**80))
_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_TEXTS, inner, max_size=4)),
    max_leaves=10,
)


def outcome(read: Any, raw: bytes) -> Any:
    try:
        return repr(read(raw))
    except Refused as refused:
        return refused.reason, refused.detail


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    _VALUES,
    st.booleans(),
    st.sampled_from([None, (" , ", " : "), (",", ":")]),
    st.integers(0, 10**6),
    st.integers(0, 255),
)
def test_both_ways_agree_on_whole_and_damaged_json(value: Any, escaped: bool, between: Any, place: int, byte: int):
    raw = bytearray(json.dumps(value, ensure_ascii=escaped, separators=between).encode())
    assert outcome(strict_json.parse, bytes(raw)) == repr(value)
    raw[place % len(raw)] = byte
    assert outcome(strict_json.parse, bytes(raw)) == outcome(strict_json._careful, bytes(raw))


@pytest.mark.parametrize(
    "raw",
    [
        rb'{"a": 1, "a": 2}',
        rb'{"a" : 1, "a": 2}',
        rb'{"a\\": 1, "b": 1, "b": 2}',
        rb'{"a\\": 1, "b": "\":", "b": 2}',
        rb'{"a": "\":", "b": {"c": 1, "c": 1}}',
        rb'{"\u0061": 1, "a": 2}',
        rb'[[{"x": "\\\":"}], {"a": 1, "b": 2, "a" :3}]',
    ],
)
def test_a_key_that_stands_twice_is_found_whatever_stands_beside_it(raw: bytes):
    with pytest.raises(Refused, match="duplicate_key"):
        strict_json.parse(raw)


def test_plain_records_take_the_quick_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(strict_json, "_careful", lambda raw: pytest.fail("the careful way"))
    for value in ({"a": "x: \\ \n", "b": [{"c": 1.5, "d": None}]}, {"tools": '[{"name": "f", "n": {"m": ":"}}]'}):
        assert strict_json.parse(json.dumps(value).encode()) == value
