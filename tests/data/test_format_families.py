"""Preferences, trees, tasks, documents, other trainers' columns and roles: what is taken of each, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from dstune.config.schema import Source
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.formats import to_conversations, to_parts
from dstune.data.sources import expand, read

USER, ANSWER = Message("user", "q"), Message("assistant", "a")
ASKED, GOOD, BAD = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "assistant", "content": "b"},
)


def convert(record: dict[str, Any], **settings: Any) -> list[Conversation]:
    return to_conversations(record, Source(path="x", **settings))


def refused(record: dict[str, Any], **settings: Any) -> Refused:
    with pytest.raises(Refused) as caught:
        convert(record, **settings)
    return caught.value


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.messages]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"question": "q", "system": "", "chosen": "a", "rejected": "b"},
        {
            "prompt": "q",
            "chosen": [ASKED, GOOD],
            "rejected": [ASKED, BAD],
            "messages": [ASKED, GOOD],
            "score_chosen": 8.0,
        },
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {}},
        {"instruction": "q", "chosen_response": "a", "rejected_response": "b"},
        {"query": "q", "response": "a", "rejected_response": "b"},
        {"messages": [ASKED, GOOD], "rejected_response": "b"},
        {"messages": [ASKED, GOOD], "rejected_messages": [ASKED, BAD]},
        {"prompt": "q", "completion": "a", "label": True},
        {"messages": [ASKED, GOOD], "label": True},
    ],
)
def test_of_preferences_the_chosen_side_is_taken_where_the_run_file_says_so(record: dict[str, Any]):
    (made,) = convert(record, use="chosen")
    assert said(made) == [("user", "q"), ("assistant", "a")]
    assert made.messages[-1].train is None
    found = refused(record)
    assert found.reason == "preference_data" and "use: chosen" in found.detail


def test_of_preferences_only_the_chosen_answer_is_learnt():
    earlier = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, ASKED]
    for record in (
        {"prompt": earlier, "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [*earlier, GOOD], "rejected": [*earlier, BAD]},
    ):
        (made,) = convert(record, use="chosen")
        assert [message.train for message in made.messages if message.role == "assistant"] == [False, None]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "completion": "b", "label": False}, "rejected_answer"),
        ({"chosen": "Human: q Assistant: a", "rejected": "b"}, "unknown_format"),
        ({"prompt": "other", "chosen": [ASKED, GOOD], "rejected": [BAD]}, "ambiguous_format"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty_answer"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "non_text_content"),
    ],
)
def test_a_preferred_side_that_is_none_is_refused(record: dict[str, Any], reason: str):
    assert refused(record, use="chosen").reason == reason


def test_columns_that_the_user_names_settle_a_preference():
    record = {"question": "q", "chosen": "a", "rejected": "b"}
    assert convert(record, columns={"completion": "chosen"}) == [Conversation((USER, ANSWER))]
    record = {"question": "q", "response_j": "a", "response_k": "b"}
    (made,) = convert(record, use="chosen", columns={"chosen": "response_j", "rejected": "response_k"})
    assert said(made) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("record", "reason", "named"),
    [
        ({"messages": [ASKED, GOOD], "images": ["a.png"]}, "unsupported_column", "images"),
        ({"prompt": "q", "completion": "a", "image": "a.png"}, "unsupported_column", "ignored"),
        ({"messages": [ASKED, {**GOOD, "images": ["x"]}]}, "unsupported_part", "messages[1]"),
        ({"messages": [ASKED, {**GOOD, "train_detail": [{"begin_offset": 0}]}]}, "unsupported_part", "train_detail"),
        (
            {"messages": [ASKED, GOOD], "chat_template_kwargs": {"enable_thinking": False}},
            "unsupported_column",
            "chat_",
        ),
        ({"prompt": "q", "completion": "a", "sample_weight": 0.5}, "unsupported_weight", "0.5"),
        ({"messages": [ASKED, {**GOOD, "weight": 1, "train": False}]}, "unsupported_weight", "contradict"),
        ({"inputs": "q", "targets": "a", "is_correct": False}, "rejected_answer", "wrong"),
        ({"question": "q", "context": "c", "answer": "a"}, "ambiguous_format", "columns"),
        ({"question": "q", "choices": ["a", "b"], "answer": "a"}, "ambiguous_format", "choices"),
        ({"messages": [ASKED, {"role": "narrator", "content": "x"}]}, "unknown_role", "assistant_tag"),
        ({"instruction": "q", "output": "a", "messages": [ASKED, GOOD]}, "ambiguous_format", "messages"),
        ({"prompt": "q", "completions": ["a"], "labels": [True]}, "unknown_format", "completions"),
        ({"prompt": "q", "completion": ["a"]}, "non_text_content", "a list"),
        ({"text": "x"}, "unknown_format", "format: documents"),
        ({"INSTRUCTION": "q", "RESPONSE": "a"}, "unknown_format", "{prompt: INSTRUCTION, completion: RESPONSE}"),
        ({"prompt": "q", "chosen": "a"}, "unknown_format", "use: chosen"),
        ({"message_id": "1", "parent_id": None, "role": "prompter", "text": "q"}, "unknown_format", "trees"),
        ({"system": "s", "system_prompt": "t", "query": "q", "response": "a"}, "ambiguous_format", "system"),
    ],
)
def test_what_changes_the_meaning_and_is_not_taken_is_refused(record: dict[str, Any], reason: str, named: str):
    found = refused(record)
    assert (found.reason, named in found.detail) == (reason, True), found


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, GOOD], "images": [], "tools": None, "label": None},
        {"query": "q", "response": "a", "images": None, "objects": {}, "history": "[]"},
        {"prompt": [ASKED], "completion": GOOD},
        {"problem": "q", "solution": "a"},
        {
            "inputs": [5, 1],
            "inputs_pretokenized": "q",
            "targets": [6, 1],
            "targets_pretokenized": "a",
            "is_correct": True,
        },
        {"conversation": [{"input": "q", "output": "a"}]},
        {"conversations": [{"user": "q", "assistant": "a"}]},
        {"messages": [{"role": "usr", "content": "q"}, {"role": "Bot", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "content": "q"}]}, GOOD]},
        {"messages": None, "instruction": "q", "output": "a"},
        {"label": 3, "question": "q", "answer": "a"},
    ],
)
def test_more_spellings_of_the_same_conversation(record: dict[str, Any]):
    (made,) = convert(record)
    assert said(made) == [("user", "q"), ("assistant", "a")]


def test_a_column_is_set_aside_by_renaming_it():
    record = {"messages": [ASKED, GOOD], "images": ["a.png"]}
    assert convert(record, columns={"ignored": "images"}) == [Conversation((USER, ANSWER))]
    record = {"question": "q", "context": "c", "answer": "a"}
    assert said(convert(record, columns={"instruction": "question", "input": "context"})[0])[0] == ("user", "q\nc")
    assert said(convert(record, columns={"prompt": "question"})[0])[0] == ("user", "q")


def test_speakers_and_parts_of_turns_that_columns_name():
    tags = {"messages": "chat", "role_tag": "who", "content_tag": "what", "user_tag": "A", "assistant_tag": "system"}
    chat = [{"who": "A", "what": "q"}, {"who": "system", "what": "a"}]
    assert convert({"chat": chat}, columns=tags) == [Conversation((USER, ANSWER))]


def test_thoughts_in_a_column_of_their_own():
    (made,) = convert({"prompt": "q", "completion": "a", "reasoning_content": "r"})
    assert made.messages[-1].reasoning == "r"


def test_tools_and_calls_spelled_as_text():
    record = {
        "messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": '[{"name": "f", "arguments": "{}"}]'}],
        "tools": ['{"type": "function", "name": "f"}'],
    }
    (made,) = convert(record)
    assert made.tools == ({"type": "function", "function": {"name": "f"}},)
    assert made.messages[1].tool_calls == ({"type": "function", "function": {"name": "f", "arguments": {}}},)


def test_tasks_whole_and_flat():
    for record in (
        {"Definition": ["d"], "Instance": {"id": "1", "input": "i", "output": ["a"]}},
        {"definition": "d", "inputs": "i", "targets": "a", "task_name": "t"},
        {"Definition": "d", "input": "i", "output": ["a"]},
    ):
        assert said(convert(record)[0]) == [("user", "d\ni"), ("assistant", "a")]
    task = {"Definition": ["d"], "Instances": [{"input": "i", "output": ["a", ""]}, {"input": "j", "output": []}]}
    parts = to_parts(task, Source(path="x"))
    assert [part.reason if isinstance(part, Refused) else "" for part in parts] == ["", "empty_answer", "empty_answer"]


def test_documents_are_whole_texts():
    (made,) = convert({"text": "all of it\n", "id": 3}, format="documents")
    assert made == Conversation((Message("document", "all of it\n"),), document=True)
    assert convert({"body": "x"}, format="documents", columns={"text": "body"})[0].document
    assert refused({"text": " "}, format="documents").reason == "empty_document"
    assert refused({"prompt": "q"}, format="documents").reason == "unknown_format"


def node(text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
    role = "prompter" if text.startswith("u") else "assistant"
    return {"message_id": text, "text": text, "role": role, "deleted": False, "replies": list(replies), **more}


def paths(root: dict[str, Any], **settings: Any) -> list[str]:
    parts = to_parts({"message_tree_id": "t", "prompt": root}, Source(path="x", **settings))
    return [
        part.reason if isinstance(part, Refused) else " ".join(message.content for message in part.messages)
        for part in parts
    ]


def test_every_path_of_a_tree_ends_with_an_answer_and_stands_once():
    tree = node("u1", node("a1", node("u2"), node("u3")), node("a2", node("u4", node("a3"), node("a4")), node("u5")))
    assert paths(tree) == ["u1 a1", "u1 a2 u4 a3", "u1 a2 u4 a4"]
    with pytest.raises(Refused, match="no_answer"):
        paths(node("u1", node("u2")))


def test_the_best_path_follows_rank_then_quality_then_order():
    first = node("a1", node("u2", node("a2")), rank=1)
    second = node("a3", node("u3"), node("u4", node("a4"), node("a5", labels={"quality": {"value": 0.7}})), rank=0)
    assert paths(node("u1", first, second, node("a6")), paths="best") == ["u1 a3 u4 a5"]
    assert paths(node("u1", node("a1"), node("a2")), paths="best") == ["u1 a1"]


def test_what_was_deleted_or_not_reviewed_is_refused_with_all_below():
    tree = node("u1", node("a1", node("u2", node("a2", deleted=True), node("a3"))), node("a4", review_result=False))
    assert paths(tree) == ["u1 a1 u2 a3", "deleted_message", "not_reviewed"]
    assert paths(node("u1", node("a1"), review_result=None)) == ["not_reviewed"]
    with pytest.raises(Refused, match="unfinished_tree"):
        convert({"message_tree_id": "t", "tree_state": "halted_by_moderator", "prompt": node("u1", node("a1"))})


@pytest.mark.shared
def test_real_trees(shared_data: Path):
    (file,) = expand(Source(path="oasst/en_100_tree.jsonl"), shared_data)
    trees = [record.value for record in read(file) if record.value]

    def last_answers(message: dict[str, Any]) -> int:
        below = sum(map(last_answers, message["replies"]))
        return below or int(message["role"] == "assistant")

    every = [convert(tree) for tree in trees if last_answers(tree["prompt"])]
    assert [len(made) for made in every] == [count for tree in trees if (count := last_answers(tree["prompt"]))]
    assert all(made.messages[-1].role == "assistant" for paths in every for made in paths)
    assert all(len(convert(tree, paths="best")) == 1 for tree in trees if last_answers(tree["prompt"]))


_NO_TRAINING_DATA = {
    "MANIFEST.jsonl": "unknown_format",
    "bfcl": "unknown_format",
    "humaneval": "unknown_format",
    "naughty_strings/blns.json": "not_an_object",
    "llama_factory/dpo_en_demo.json": "preference_data",
    "tokenizers": "unknown_format",
}


@pytest.mark.shared
def test_the_first_records_of_every_real_file_are_taken_or_refused_for_what_they_are(shared_data: Path):
    files = [file for suffix in ("json", "jsonl", "csv") for file in sorted(shared_data.rglob(f"*.{suffix}"))]
    assert len(files) > 100
    for path in files:
        name = str(path.relative_to(shared_data))
        if name.endswith("dataset_info.json"):  # a registry wants an entry
            continue
        expected = next((why for start, why in _NO_TRAINING_DATA.items() if name.startswith(start)), None)
        (file,) = expand(Source(path=name), shared_data)
        for record, _ in zip(read(file), range(50), strict=False):
            try:
                if record.value is None:
                    assert record.error is not None
                    raise record.error
                parts = to_parts(record.value, file.source)
            except Refused as error:
                assert error.reason == expected, (name, record.line, error)
                continue
            assert expected is None and parts, name
            assert not any(isinstance(part, Refused) for part in parts), (
                name,
                record.line,
                json.dumps(record.value)[:200],
            )
