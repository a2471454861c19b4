"""Whatever a record holds: conversations with texts in them, or a reason; never a traceback."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstune.config.schema import Source
from dstune.data.conversation import Refused
from dstune.data.formats import to_parts

_KEYS = [
    *("instruction", "input", "output", "prompt", "completion", "question", "answer", "context", "history", "system"),
    *("messages", "conversations", "conversation", "role", "content", "from", "value", "tools", "tool_calls", "type"),
    *("function", "name", "arguments", "text", "thinking", "reasoning_content", "weight", "train", "label", "images"),
    *("chosen", "rejected", "rejected_response", "Definition", "Instances", "Instance", "instances", "message_tree_id"),
    *("replies", "message_id", "parent_id", "rank", "labels", "quality", "deleted", "review_result", "tree_state"),
    *("inputs_pretokenized", "targets_pretokenized", "is_correct", "loss_weight", "human", "assistant", "targets"),
]
_WORDS = st.sampled_from(
    [
        *("", " ", "x", "user", "assistant", "system", "tool", "function_call", "prompter", "bot", "text", "tool_call"),
        *("[", "{}", '{"name": "f", "arguments": {}}', '[{"role": "user", "content": "q"}]', "[[1, 2]]", "é\x00"),
    ]
)
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-1, 2), st.floats(allow_nan=False), _WORDS)


def _objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(_KEYS), values, max_size=7)


_VALUES = st.recursive(_SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), _objects(inner)), max_leaves=12)
_FORMATS = st.sampled_from(
    [
        *("auto", "alpaca", "sharegpt", "messages", "prompt_completion", "natural_instructions", "self_instruct"),
        *("oasst", "p3", "preference", "documents"),
    ]
)
_COLUMNS = st.sampled_from(
    [{}, {"prompt": "question"}, {"completion": "chosen"}, {"messages": "value", "role_tag": "name"}]
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(_objects(_VALUES), _FORMATS, _COLUMNS, st.sampled_from([None, "chosen"]), st.sampled_from(["all", "best"]))
def test_any_record_gives_conversations_or_a_reason(
    record: dict[str, Any], format_: str, columns: Any, use: Any, paths: Any
):
    source = Source.model_validate({"path": "x", "format": format_, "columns": columns, "use": use, "paths": paths})
    try:
        parts = to_parts(record, source)
    except Refused as refused:
        assert refused.reason and refused.detail
        return
    assert parts
    for part in parts:
        if not isinstance(part, Refused):
            assert part.messages and all(isinstance(message.content, str) for message in part.messages)
            assert all(message.role in ("system", "user", "assistant", "tool", "document") for message in part.messages)
