import io
import json

import numpy as np
import pytest
from rich.console import Console

from dstune.config.schema import RunConfig
from dstune.data import prepare
from dstune.data.preview import preview, preview_json, sample, segments, visible
from dstune.data.tokenize import load_tokenizer

NASTY = (
    "\x1b[31mred\x1b]0;title\x07 [bold]markup[/bold] [link=http://x]y[/link] \u202etfel \u009b2J \r over \x7f \u2028"
)


@pytest.fixture
def prepared_and_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    records = [
        {"instruction": f"Question {number} {NASTY}", "output": f"Answer {number} {NASTY}"} for number in range(20)
    ]
    lines = [json.dumps(record) for record in records]
    name = "data [red]\x1b[1m.jsonl"
    (tmp_path / name).write_text("\n".join([*lines, json.dumps({"foo\x1b[5m": 1}), "{"]))
    config = RunConfig.model_validate(
        {
            "name": "shown",
            "model": {"path": "builtin:tiny-llama"},
            "data": {
                "sources": [{"path": name}],
                "bad_rows": "skip",
                "max_length": 512,
                "validation": 0.1,
                "num_processes": 1,
            },
        }
    )
    return prepare.prepare(config, tmp_path), load_tokenizer(config.model, tmp_path)


def printed(parts, **options):
    console = Console(file=io.StringIO(), width=400, **options)
    for part in parts:
        console.print(part)
    return console.file.getvalue()


def test_what_is_shown(prepared_and_tokenizer):
    prepared, tokenizer = prepared_and_tokenizer
    text = printed(preview(prepared, tokenizer, 3, 0))
    assert "18 (18 an epoch)" in text and "2 examples in 1 row " in text
    assert "1 unknown_format" in text and "1 invalid_json" in text
    assert f"{prepared.manifest['counts']['fill']:.2%} of" in text
    for number in sample(prepared, 3, 0):
        line = prepared.example(number).line
        assert f"example {number} · data [red]\\x1b[1m.jsonl:{line} ·" in text
        assert f"Question {line - 1} " in text
    assert text.count("⟦Answer") == 3


def test_nothing_in_the_data_reaches_the_terminal(prepared_and_tokenizer):
    prepared, tokenizer = prepared_and_tokenizer
    text = printed(preview(prepared, tokenizer, 20, 0))
    for character in "\x1b\x07\x7f\u009b\u202e\u2028\r":
        assert character not in text
    assert "[bold]markup[/bold]" in text and "[link=http://x]y[/link]" in text
    assert "\\x1b[31mred" in text and "\\u202etfel" in text
    coloured = printed(preview(prepared, tokenizer, 20, 0), force_terminal=True, color_system="standard")
    assert "\x1b]0" not in coloured and "\x07" not in coloured and "\x1b[5m" not in coloured


def test_trained_tokens_are_coloured(prepared_and_tokenizer):
    prepared, tokenizer = prepared_and_tokenizer
    text = printed(preview(prepared, tokenizer, 1, 0), force_terminal=True, color_system="standard")
    assert "\x1b[1;32mAnswer" in text and "\x1b[1;32mQuestion" not in text


def test_plain_values(prepared_and_tokenizer):
    prepared, tokenizer = prepared_and_tokenizer
    shown = preview_json(prepared, tokenizer, 4, 7)
    json.dumps(shown, allow_nan=False)
    assert shown["counts"] == prepared.manifest["counts"]
    assert shown["validation"]["examples"] == 2
    assert [one["reason"] for one in shown["rejects"]] == ["unknown_format", "invalid_json"]
    assert len(shown["examples"]) == 4
    for one in shown["examples"]:
        example = prepared.example(one["example"])
        assert (one["line"], one["part"]) == (example.line, 0)
        whole = tokenizer.decode(example.input_ids.tolist(), skip_special_tokens=False)
        assert "".join(part["text"] for part in one["segments"]) == whole
        trained = [part["text"] for part in one["segments"] if part["trained"]]
        assert trained == [f"Answer {one['line'] - 1} {NASTY}<|im_end|>"]


def test_the_sample_is_drawn_by_seed(prepared_and_tokenizer):
    prepared, _ = prepared_and_tokenizer
    assert sample(prepared, 5, 1) == sample(prepared, 5, 1) != sample(prepared, 5, 2)
    assert sorted(sample(prepared, 100, 0)) == list(range(18))
    assert sample(prepared, 0, 0) == []


def test_segments_keep_a_character_that_is_cut_between_tokens(prepared_and_tokenizer):
    _, tokenizer = prepared_and_tokenizer
    ids = np.array(tokenizer("龘", add_special_tokens=False)["input_ids"])
    assert len(ids) > 1
    mask = np.arange(len(ids)) > 0
    assert [part.trained for part in segments(tokenizer, ids, mask)] == [False, True]


def test_visible():
    assert visible("a\tb\nç 龘 😀 👩\u200d🚀") == "a\tb\nç 龘 😀 👩\u200d🚀"
    assert visible("\x00\x1b\x9b\u202e\ue000\U000e0001\ud800") == "\\x00\\x1b\\x9b\\u202e\\ue000\\U000e0001\\ud800"
