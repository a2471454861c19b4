"""Records of every format become conversations with their texts unchanged, or are refused with a reason."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dstune.config.schema import Source
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.formats import to_conversations
from dstune.data.sources import expand, read

USER, ANSWER = Message("user", "q"), Message("assistant", "a")


def convert(record: dict[str, Any], **settings: Any) -> list[Conversation]:
    before = copy.deepcopy(record)
    made = to_conversations(record, Source(path="x", **settings))
    assert record == before
    return made


def refused(record: dict[str, Any], **settings: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        convert(record, **settings)
    return caught.value


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": "", "output": "a", "system": "", "history": []},
        {"instruction": "q", "input": None, "output": "a", "text": "rendered", "id": 3},
        {"instruction": "", "input": "q", "output": "a"},
        {"instruction": "q", "context": "", "response": "a", "category": "qa"},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a"},
        {"query": "q", "response": "a"},
        {"input": "q", "output": "a"},
        {"inputs": "q", "targets": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "User", "content": [{"type": "text", "text": "q"}]}, {"role": "model", "content": "a"}]},
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": "x"},
        {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversation": [{"human": "q", "assistant": "a"}]},
        {"prompt": "q", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ],
)
def test_every_form_of_the_same_conversation(record: dict[str, Any]):
    assert convert(record) == [Conversation((USER, ANSWER))]


def test_input_system_and_history():
    record = {"instruction": "q", "input": "i", "output": "a", "system": "s", "history": [["hq", "ha"]]}
    (made,) = convert(record)
    said = [(message.role, message.content) for message in made.messages]
    assert said == [("system", "s"), ("user", "hq"), ("assistant", "ha"), ("user", "q\ni"), ("assistant", "a")]


def test_texts_are_not_touched():
    text = "  \n<|im_end|> {{x}} 007 \u200b\ufeff é \r\n "
    (made,) = convert({"prompt": text, "completion": text})
    assert [message.content for message in made.messages] == [text, text]


def test_columns_rename_and_decide():
    record = {"q": "q", "a": "a", "solution": "other"}
    assert convert(record, columns={"prompt": "q", "completion": "a"}) == [Conversation((USER, ANSWER))]
    record = {"question": "q", "answer": "a", "response": "other"}
    assert refused(record).reason == "ambiguous_format"
    assert convert(record, columns={"completion": "answer"})[0].messages[-1].content == "a"
    assert refused({"x": "1"}, columns={"prompt": "q"}).reason == "missing_column"
    turns = {"chat": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert convert(turns, columns={"messages": "chat"}) == [Conversation((USER, ANSWER))]


def test_a_named_format_settles_it():
    both = {"instruction": "q", "output": "a", "prompt": "other", "completion": "other"}
    assert convert(both, format="alpaca") == [Conversation((USER, ANSWER))]
    both = {"prompt": "q", "completion": "a", "messages": [{"role": "user", "content": "other"}]}
    assert refused(both).reason == "ambiguous_format"
    assert convert(both, format="prompt_completion") == [Conversation((USER, ANSWER))]
    assert convert(both, format="messages")[0].messages == (Message("user", "other"),)
    assert refused({"prompt": "q", "completion": "a"}, format="sharegpt").reason == "unknown_format"


@pytest.mark.parametrize(
    ("record", "reason", "named"),
    [
        ({"text": "all of it"}, "unknown_format", "'text'"),
        ({}, "unknown_format", "(none)"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference_data", "use: chosen"),
        ({"instruction": "q", "output": 42}, "non_text_content", "output holds a number"),
        ({"instruction": "q", "output": None}, "non_text_content", "null"),
        ({"instruction": 1.5, "output": "a"}, "non_text_content", "instruction"),
        ({"instruction": "q", "input": ["i"], "output": "a"}, "non_text_content", "input holds a list"),
        ({"prompt": "q", "completion": True}, "non_text_content", "true or false"),
        ({"instruction": "q", "output": " \n"}, "empty_answer", "output"),
        ({"instruction": "", "input": "", "output": "a"}, "empty_prompt", "instruction"),
        ({"messages": []}, "no_turns", "messages"),
        ({"messages": 3}, "no_turns", "a number"),
        ({"messages": ["q", "a"]}, "bad_turn", "messages[0]"),
        ({"messages": [{"role": "user"}]}, "non_text_content", "messages[0]"),
        ({"messages": [{"role": "user", "content": 3}]}, "non_text_content", "messages[0].content"),
        ({"messages": [{"content": "q"}]}, "bad_turn", "content"),
        ({"messages": [{"role": "assitant", "content": "q"}]}, "unknown_role", "'assistant'"),
        ({"messages": [{"role": "", "content": "q"}]}, "unknown_role", "empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "non_text_content", "image_url"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "empty_answer", "messages[0]"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "unsupported_weight", "0.5"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": "1"}]}, "unsupported_weight", "'1'; a token is"),
        ({"messages": [{"role": "user", "content": " "}]}, "empty_prompt", "messages[0]"),
        ({"messages": [{"user": "", "assistant": "a"}]}, "empty_prompt", "messages[0].user"),
        ({"instruction": "q", "output": "a", "history": [["", "b"]]}, "empty_prompt", "history[0]"),
        ({"conversations": [{"from": "function_call", "value": "no json"}]}, "bad_tool_call", "conversations[0]"),
        ({"conversations": [{"from": "function_call", "value": "[1,,]"}]}, "bad_tool_call", "character 4 of the call"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "tools": "[3]"}, "bad_tools", "a number"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "tools": "{"}, "bad_tools", "character 2 of the tools"),
        (
            {"conversations": [{"from": "gpt", "value": "a"}], "tools": [{"function": {"name": []}}]},
            "bad_tools",
            "name",
        ),
        ({"messages": [{"role": "system", "content": "s"}], "system": "t"}, "ambiguous_format", "system"),
        ({"messages": [1], "conversations": [1]}, "ambiguous_format", "'messages', 'conversations'"),
        ({"instruction": "q", "output": "a", "history": 3}, "bad_turn", "history"),
        ({"Definition": "d", "Instances": 3}, "unknown_format", "Instances"),
    ],
)
def test_what_is_not_understood_is_refused(record: dict[str, Any], reason: str, named: str):
    found = refused(record)
    assert (found.reason, named in found.detail) == (reason, True), found


def test_tool_calls_of_every_spelling():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "1", "n": 2.0}}}
    spelled = json.dumps({"name": "f", "arguments": {"x": "1", "n": 2.0}})
    for turn in (
        {"from": "function_call", "value": spelled},
        {"from": "function_call", "value": {"name": "f", "arguments": {"x": "1", "n": 2.0}}},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": "1", "n": 2.0}'}}]},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": "1", "n": 2.0}'}},
        {"role": "assistant", "content": [{"type": "tool_call", "value": spelled}]},
    ):
        (made,) = convert({"messages": [turn], "tools": json.dumps([{"name": "f", "parameters": {}}])})
        assert made.messages == (Message("assistant", "", tool_calls=(call,)),)
        assert made.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)


def test_conversation_as_prompt_trains_the_completion_only():
    prompt = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    (made,) = convert({"prompt": prompt, "completion": [{"role": "assistant", "content": "4"}]})
    assert [message.train for message in made.messages] == [None, False, None, None]


def test_weights_and_reasoning_are_kept():
    turns = [
        {"role": "user", "content": "q", "loss_weight": 0.0},
        {"role": "assistant", "content": "a", "loss_weight": 1.0, "reasoning_content": "r"},
        {"role": "assistant", "content": "b", "weight": 0},
    ]
    (made,) = convert({"messages": turns})
    assert [message.train for message in made.messages] == [False, True, False]
    assert made.messages[1].reasoning == "r"


def test_nested_instances_are_parts():
    record = {"instruction": "q", "instances": [{"input": "", "output": "a"}, {"input": "i", "output": "b"}]}
    assert [conversation.messages[0].content for conversation in convert(record)] == ["q", "q\ni"]
    task = {"Definition": ["d"], "Instances": [{"input": "i", "output": ["x", "y"]}, {"input": "j", "output": "z"}]}
    assert [conversation.messages[1].content for conversation in convert(task)] == ["x", "y", "z"]


@pytest.mark.shared
@pytest.mark.parametrize(
    ("path", "records", "conversations"),
    [
        ("gsm8k/gsm_8k_train.json", 7473, 7473),
        ("llama_factory/alpaca_en_demo.json", 999, 999),
        ("llama_factory/alpaca_zh_demo.json", 1000, 1000),
        ("llama_factory/glaive_toolcall_en_demo.json", 300, 300),
        ("llama_factory/glaive_toolcall_zh_demo.json", 300, 300),
        ("llama_factory/identity.json", 91, 91),
        ("llama_factory/v1_sft_demo.jsonl", 500, 500),
        ("fastchat/dummy_conversation.json", 500, 500),
        ("dolly/dolly_fixture.json", 12, 12),
        ("torchtitan_sft/data.json", 10, 10),
        ("crosswoz/val_sharegpt.jsonl", 500, 500),
        ("t0_p3/*.jsonl", 17891, 17891),
        ("ms_swift_formats/*", 18, 18),
        ("belle/zh_seed_tasks.json", 175, 175),
        ("self_instruct/seed_tasks.jsonl", 175, 175),
        ("superni_via_sapt/task639_multi_woz_user_utterance_generation/*.json", 2, 160),
    ],
)
def test_real_files_are_understood_whole(shared_data: Path, path: str, records: int, conversations: int):
    source = Source(path=path)
    found = [record for file in expand(source, shared_data) for record in read(file)]
    made = [to_conversations(record.value, source) for record in found if record.value is not None]
    assert (len(found), sum(map(len, made))) == (records, conversations)


@pytest.mark.shared
def test_preferences_are_refused(shared_data: Path):
    (file,) = expand(Source(path="llama_factory/dpo_en_demo.json"), shared_data)
    for record in read(file):
        assert record.value is not None and refused(record.value).reason == "preference_data"


@pytest.mark.shared
def test_naughty_strings_pass_through_every_column(shared_data: Path):
    for naughty in json.loads((shared_data / "naughty_strings/blns.json").read_text()):
        if not naughty.strip():
            continue
        (made,) = convert({"instruction": naughty, "input": naughty, "output": naughty, "system": naughty})
        assert [message.content for message in made.messages] == [naughty, f"{naughty}\n{naughty}", naughty]
