"""Cleaning, comparison with evaluation data, repetitions and mixing on the way from raw files to a prepared directory."""

import json
from collections import Counter
from pathlib import Path

import pytest

from dstune.cli.main import main

QUESTION = "Natalia sold clips to forty eight of her friends in April and then she sold half as many in May"


def words(first, count=40):
    return " ".join(f"word{number}" for number in range(first, first + count))


def row(question, answer):
    return {"instruction": question, "input": "", "output": answer}


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    good = [row(f"Tell me about {number}.", words(number * 100)) for number in range(40)]
    write(
        tmp_path / "first.jsonl",
        [
            *good,
            row("Who are you?", "I am {{name}}."),
            row("Feel!", "As an AI language model, I don't have feelings."),
            row("Count.", QUESTION + "."),
            row("Mail?", "Write to ada@gmail.com  today.\u200b"),
        ],
    )
    write(
        tmp_path / "second.jsonl",
        [
            row("TELL me about 3.", words(300)),
            row("Tell me about 4.", words(400, 39) + " changed"),
            row("Tell me about fish.", words(9000)),
            row("Empty?", "<nooutput>"),
        ],
    )
    write(tmp_path / "eval.jsonl", [{"question": QUESTION, "answer": "72"}])
    (tmp_path / "run.yaml").write_text("""
name: quality
model: {path: builtin:tiny-llama}
data:
  sources: [{path: first.jsonl}, {path: second.jsonl}]
  max_length: 1024
  num_processes: 1
  clean:
    - placeholders: {values: {name: Ada}}
    - control_characters
    - whitespace
    - refusals
    - personal_data: {action: mask}
  deduplicate: near
  decontaminate: {against: [eval.jsonl]}
""")  # fmt: skip
    return tmp_path / "run.yaml"


def prepared(run_file, capsys, *overrides):
    status = main(["prepare", str(run_file), *overrides, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_every_drop_is_counted_and_listed_with_its_reason(run_file, capsys):
    status, shown = prepared(run_file, capsys)
    assert status == 0
    root = Path(shown["prepared"])
    manifest = json.loads((root / "manifest.json").read_text())
    first, second = manifest["sources"]
    assert first["conversations"]["dropped"] == {"clean_refusals": 1, "contaminated": 1}
    assert second["conversations"]["dropped"] == {"clean_placeholders": 1, "duplicate": 1, "near_duplicate": 1}
    assert first["cleaned"] == {"control_characters": 1, "personal_data": 1, "placeholders": 1, "whitespace": 1}
    for source in (first, second):
        made = source["conversations"]
        assert made["made"] == made["kept"] + sum(made["dropped"].values())
        assert source["examples"] == made["kept"]
    rejects = [json.loads(line) for line in (root / "rejects.jsonl").read_text().splitlines()]
    assert Counter((one["file"], one["line"], one["reason"]) for one in rejects) == Counter(
        [
            ("first.jsonl", 42, "clean_refusals"),
            ("first.jsonl", 43, "contaminated"),
            ("second.jsonl", 1, "duplicate"),
            ("second.jsonl", 2, "near_duplicate"),
            ("second.jsonl", 4, "clean_placeholders"),
        ]
    )
    told = {one["line"]: one["detail"] for one in rejects if one["file"] == "second.jsonl"}
    assert "first.jsonl:4" in told[1] and "first.jsonl:5" in told[2]


def hashes(shown):
    return {
        file["name"]: file["sha256"]
        for file in json.loads((Path(shown["prepared"]) / "manifest.json").read_text())["files"]
    }


def test_processes_do_not_change_a_byte_and_settings_do(run_file, capsys):
    _, one = prepared(run_file, capsys)
    before = hashes(one)
    Path(one["prepared"]).rename(run_file.parent / "kept-aside")
    _, two = prepared(run_file, capsys, "data.num_processes=2")
    assert one["prepared"] == two["prepared"]
    assert hashes(two) == before
    _, other = prepared(run_file, capsys, "data.decontaminate.ngram=20")
    assert other["prepared"] != one["prepared"]
    _, whole = prepared(run_file, capsys, "data.clean=[]", "data.deduplicate=off", "data.decontaminate=null")
    assert whole["counts"]["examples"] == 48


def test_mistakes_in_cleaning_are_told_before_anything_is_read(run_file, capsys):
    status, shown = prepared(run_file, capsys, "data.clean=[whitespaces, {ratio: {max: 3}}]")
    assert status == 2
    assert "data.clean[0]" in shown["error"] and "'whitespace'" in shown["error"] and "data.clean[1]" in shown["error"]


def test_a_temperature_evens_out_what_is_left(run_file, capsys):
    _, shown = prepared(run_file, capsys, "data.temperature=100", "data.deduplicate=exact")
    manifest = json.loads((Path(shown["prepared"]) / "manifest.json").read_text())
    shares = [one["examples_per_epoch"] for one in manifest["source_settings"]]
    kept = [source["examples"] for source in manifest["sources"]]
    assert sum(shares) == pytest.approx(sum(kept), abs=1)
    assert abs(shares[0] - shares[1]) <= 2
