"""Entries of LLaMA-Factory's registry become sources: columns, tags, splits, limits, preferences, plain texts."""

import json
from pathlib import Path
from typing import Any

import pytest

from dstune.config.schema import Source
from dstune.data.conversation import Refused
from dstune.data.formats import to_conversations
from dstune.data.sources import expand, read
from dstune.errors import ConfigError

ENTRIES: dict[str, Any] = {
    "pairs": {"file_name": "pairs.json", "columns": {"prompt": "ask", "query": "about", "response": "say"}},
    "turns": {
        "file_name": "turns.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "chat", "system": "rule"},
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "A", "assistant_tag": "B"},
    },
    "openai": {"file_name": "openai.jsonl", "formatting": "openai"},
    "ranked": {
        "file_name": "ranked.json",
        "ranking": True,
        "columns": {"prompt": "ask", "chosen": "up", "rejected": "down"},
    },
    "wanted": {"file_name": "wanted.json", "columns": {"prompt": "ask", "response": "say", "kto_tag": "good"}},
    "texts": {"file_name": "texts.jsonl", "columns": {"prompt": "body"}, "num_samples": 1},
    "elsewhere": {"ms_hub_url": "owner/name"},
    "code": {"script_url": "name"},
    "number": {"file_name": 3},
    "strange": {"file_name": "pairs.json", "formatting": "own"},
}
FILES: dict[str, list[dict[str, Any]]] = {
    "pairs.json": [{"ask": "q", "about": "i", "say": "a"}],
    "turns.jsonl": [{"chat": [{"who": "A", "what": "q"}, {"who": "B", "what": "a"}], "rule": "s"}],
    "openai.jsonl": [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
    "ranked.json": [{"ask": "q", "up": "a", "down": "b"}],
    "wanted.json": [{"ask": "q", "say": "a", "good": True}],
    "texts.jsonl": [{"body": "one"}, {"body": "two"}],
}


@pytest.fixture()
def registry(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset_info.json").write_text(json.dumps(ENTRIES))
    for name, rows in FILES.items():
        (folder / name).write_text(
            json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(r) + "\n" for r in rows)
        )
    return tmp_path


def first(base: Path, entry: str, **settings: Any) -> tuple[str, list[tuple[str, str]]]:
    (file,) = expand(Source(path="data/dataset_info.json", entry=entry, **settings), base)
    record = next(iter(read(file)))
    assert record.value is not None
    (made,) = to_conversations(record.value, file.source)
    return file.name, [(message.role, message.content) for message in made.messages]


def test_each_entry_is_read_as_it_says(registry: Path):
    asked, answered = ("user", "q"), ("assistant", "a")
    assert first(registry, "pairs") == ("data/pairs.json", [("user", "q\ni"), answered])
    assert first(registry, "turns") == ("data/turns.jsonl", [("system", "s"), asked, answered])
    assert first(registry, "openai") == ("data/openai.jsonl", [asked, answered])
    assert first(registry, "ranked", use="chosen") == ("data/ranked.json", [asked, answered])
    assert first(registry, "wanted", use="chosen") == ("data/wanted.json", [asked, answered])
    assert first(registry, "texts") == ("data/texts.jsonl", [("document", "one")])
    for entry in ("ranked", "wanted"):
        with pytest.raises(Refused, match="preference_data"):
            first(registry, entry)


def test_the_directory_names_its_registry_and_limits_are_the_smaller(registry: Path):
    (file,) = expand(Source(path="data", entry="texts", limit=5), registry)
    assert (file.name, file.source.limit) == ("data/texts.jsonl", 1)


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ("pair", "did you mean 'pairs'"),
        (None, "a registry of 10 data sets"),
        ("elsewhere", "only ms_hub_url"),
        ("code", "only script_url"),
        ("number", "file_name is a number"),
        ("strange", "formatting 'own'"),
    ],
)
def test_an_entry_that_cannot_be_used_is_told(registry: Path, entry: str | None, told: str):
    with pytest.raises(ConfigError, match=told):
        expand(Source(path="data/dataset_info.json", entry=entry), registry)


def test_an_entry_without_a_registry_is_told(registry: Path):
    with pytest.raises(ConfigError, match="no registry"):
        expand(Source(path="nowhere", entry="pairs"), registry)
    (registry / "data" / "dataset_info.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a registry"):
        expand(Source(path="data", entry="pairs"), registry)


@pytest.mark.shared
def test_the_real_registry(shared_data: Path):
    path = "llama_factory/dataset_info.json"
    for entry in ("identity", "alpaca_en_demo", "glaive_toolcall_zh_demo"):
        (file,) = expand(Source(path=path, entry=entry), shared_data)
        assert all(to_conversations(record.value or {}, file.source) for record in read(file))
    (file,) = expand(Source(path=path, entry="dpo_en_demo", use="chosen"), shared_data)
    made = [to_conversations(record.value or {}, file.source)[0] for record in read(file)]
    assert len(made) == 300 and all(one.messages[-1].role == "assistant" for one in made)
