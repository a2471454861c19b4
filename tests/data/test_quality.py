"""What is cleaned, repeated, contaminated, mixed or expanded on the way through a whole preparation: counted, listed, and right."""

import json
from collections import Counter

import pytest

from dstune.data import prepare
from dstune.errors import ConfigError
from tests.data.test_prepare import base, cache, make_config, rejects_of, require_sums, write_lines  # noqa: F401

QUESTIONS = (
    "Why is the sky blue on a clear day, and why do sunsets look red to someone who stands on the same hill?",
    "Explain how a bicycle stays upright while it moves, and what changes once its rider slows down to walking pace.",
    "Describe the steps by which flour, water, salt and yeast become a loaf of bread with an open crumb.",
)


def pair(question, answer):
    return {"prompt": question, "completion": answer}


def test_repetitions_within_and_across_sources(base, cache):  # noqa: F811
    answers = [f"Because of reason number {number}, which is long enough to be told apart." for number in range(3)]
    first = [pair(question, answer) for question, answer in zip(QUESTIONS, answers, strict=True)]
    write_lines(base / "data/a.jsonl", [*first, first[0]])
    near = pair(QUESTIONS[1].replace("bicycle", "bike"), answers[1])
    write_lines(base / "data/b.jsonl", [pair(QUESTIONS[0].upper(), answers[0]), near, pair("New?", "Yes, new.")])
    sources = [{"path": "data/a.jsonl"}, {"path": "data/b.jsonl"}]
    exact = prepare.prepare(make_config(sources=sources, deduplicate="exact", max_length=256), base)
    require_sums(exact)
    assert exact.num_examples == 5
    found = [(one["file"], one["line"], one["reason"], one["detail"]) for one in rejects_of(exact)]
    assert found == [
        ("data/a.jsonl", 4, "duplicate", "repeats data/a.jsonl:1"),
        ("data/b.jsonl", 1, "duplicate", "repeats data/a.jsonl:1"),
    ]
    settings = {"method": "near", "threshold": 0.6, "ngram": 3}
    loose = prepare.prepare(make_config(sources=sources, deduplicate=settings, max_length=256), base)
    require_sums(loose)
    assert loose.num_examples == 4
    assert Counter(one["reason"] for one in rejects_of(loose)) == {"duplicate": 2, "near_duplicate": 1}
    # The user's order decides: with the second file first, its own stay.
    other = prepare.prepare(make_config(sources=sources[::-1], deduplicate="exact", max_length=256), base)
    assert [(one["file"], one["line"]) for one in rejects_of(other)] == [("data/a.jsonl", 1), ("data/a.jsonl", 4)]


def test_repetitions_are_left_out_before_examples_are_held_out(base, cache):  # noqa: F811
    write_lines(base / "data/a.jsonl", [pair(f"Number {n % 10}?", f"It is {n % 10}.") for n in range(40)])
    prepared = prepare.prepare(make_config(deduplicate="exact", validation=0.2), base)
    require_sums(prepared)
    held_out = prepared.validation()
    assert (prepared.num_examples, held_out.num_examples) == (8, 2)


def test_cleaning_is_counted_and_listed(base, cache):  # noqa: F811
    records = [
        pair("Where do you live?", "At  home ,   at last."),
        pair("Who made you?", "I was made by {{author}}."),
        pair("Write to me.", "As an AI language model, I cannot do that."),
        pair("And?", "My address is someone@posteo.org."),
    ]
    write_lines(base / "data/a.jsonl", records)
    steps = ["whitespace", "placeholders", "refusals", {"personal_data": {"action": "flag"}}]
    prepared = prepare.prepare(make_config(clean=steps), base)
    require_sums(prepared)
    (file,) = prepared.manifest["sources"]
    assert prepared.num_examples == 2 and file["cleaned"] == {"whitespace": 1} and sum(file["flagged"].values()) == 1
    assert [(one["line"], one["reason"]) for one in rejects_of(prepared)] == [
        (2, "clean_placeholders"),
        (3, "clean_refusals"),
    ]
    with pytest.raises(ConfigError, match="whitespace"):
        prepare.prepare(make_config(clean=["whitspace"]), base)


def test_contaminated_conversations_name_what_they_share(base, cache):  # noqa: F811
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    write_lines(base / "eval.jsonl", [pair("What counts?", text)])
    write_lines(base / "data/a.jsonl", [pair("Count.", f"So: {text.upper()}!"), pair("Count not.", "No.")])
    prepared = prepare.prepare(make_config(decontaminate={"against": ["eval.jsonl"]}), base)
    require_sums(prepared)
    (reject,) = rejects_of(prepared)
    assert prepared.num_examples == 1 and reject["reason"] == "contaminated" and "eval.jsonl:1" in reject["detail"]
    assert prepared.manifest["encoding"]["notes"] == []
    write_lines(base / "short.jsonl", [pair("2 + 2?", "4")])
    short = prepare.prepare(make_config(decontaminate={"against": ["short.jsonl"]}), base)
    assert "1 of 1 evaluation records" in short.manifest["encoding"]["notes"][0]
    # Another evaluation file is another directory.
    write_lines(base / "eval.jsonl", [pair("What counts?", "Nothing of that kind.")])
    again = prepare.prepare(make_config(decontaminate={"against": ["eval.jsonl"]}), base)
    assert again.num_examples == 2 and again.root != prepared.root


def test_mixing_by_temperature_keeps_the_epoch_and_tells_the_counts(base, cache):  # noqa: F811
    write_lines(base / "data/large.jsonl", [pair(f"Large {n}?", f"{n}.") for n in range(160)])
    write_lines(base / "data/small.jsonl", [pair(f"Small {n}?", f"{n}.") for n in range(40)])
    sources = [{"path": "data/large.jsonl"}, {"path": "data/small.jsonl"}]
    plain = prepare.prepare(make_config(sources=sources), base)
    mixed = prepare.prepare(make_config(sources=sources, temperature=2.0), base)
    told = [source["examples_per_epoch"] for source in mixed.manifest["source_settings"]]
    assert [source["examples_per_epoch"] for source in plain.manifest["source_settings"]] == [160, 40]
    assert told == [133, 67]  # as the square roots of 160 and 40: two to one of the same 200
    drawn = Counter(mixed.example(int(n)).source for row in range(mixed.num_rows) for n in mixed.row(row))
    assert [drawn[0], drawn[1]] == told


def test_one_example_for_each_answer(base, cache):  # noqa: F811
    turns = [{"role": role, "content": f"{role} {number}"} for number in range(3) for role in ("user", "assistant")]
    write_lines(base / "data/a.jsonl", [{"messages": turns}])
    prepared = prepare.prepare(make_config(turns="expand"), base)
    require_sums(prepared)
    assert prepared.num_examples == 3
    assert [prepared.example(number).part for number in range(3)] == [0, 1, 2]
    lengths = [len(prepared.example(number).input_ids) for number in range(3)]
    assert lengths == sorted(lengths) and len(set(lengths)) == 3
    assert json.loads((prepared.root / "manifest.json").read_text())["settings"]["turns"] == "expand"


def test_long_documents_are_split(base, cache):  # noqa: F811
    words = " ".join(f"w{number}" for number in range(300))
    write_lines(base / "data/a.jsonl", [{"text": words}, {"text": "Short."}, {"text": words}])
    sources = [{"path": "data/a.jsonl", "format": "documents"}]
    whole = prepare.prepare(make_config(sources=sources, max_length=4096), base)
    split = prepare.prepare(make_config(sources=sources, max_length=64, overlong="split"), base)
    require_sums(split)
    assert split.manifest["sources"][0]["conversations"]["split"] == 2
    pieces = [split.example(number) for number in range(split.num_examples)]
    first = [piece for piece in pieces if piece.line == 1]
    assert [piece.part for piece in first] == list(range(len(first))) and len(first) > 5
    assert [number for piece in first for number in piece.input_ids.tolist()] == whole.example(0).input_ids.tolist()
    assert all(not piece.loss_mask[0] and piece.loss_mask[1:].all() for piece in pieces)
    once = prepare.prepare(make_config(sources=sources, max_length=64, overlong="split", deduplicate="near"), base)
    require_sums(once)
    assert once.num_examples == len(first) + 1


@pytest.mark.shared
def test_a_tokenizer_without_line_breaks_is_named(base, cache, shared_data):  # noqa: F811
    for name, kept in (("t5", False), ("gpt2", True)):
        config = make_config(template="alpaca").model_copy(deep=True)
        model = config.model.model_copy(update={"tokenizer": str(shared_data / "tokenizers" / name)})
        prepared = prepare.prepare(config.model_copy(update={"model": model}), base)
        assert any("line breaks" in note for note in prepared.manifest["encoding"]["notes"]) is not kept


def test_a_file_that_comes_twice_is_named(base, cache):  # noqa: F811
    (base / "data/b.jsonl").write_bytes((base / "data/a.jsonl").read_bytes())
    sources = [{"path": "data/a.jsonl"}, {"path": "data/b.jsonl"}]
    twice = prepare.prepare(make_config(sources=sources), base)
    assert twice.manifest["encoding"]["notes"] == [
        "data/b.jsonl has the content of data/a.jsonl: its conversations count twice"
    ]
    leaked = prepare.prepare(make_config(validation=[{"path": "data/b.jsonl"}]), base)
    assert leaked.manifest["encoding"]["notes"] == ["data/b.jsonl is held out and trained on (data/a.jsonl)"]
