"""`data.select` from run file to prepared directory: what is taken, what is said of the rest, what is done once."""

import json

import numpy as np
import pytest

from dstune import api
from dstune.cli.main import main
from dstune.config.load import load_run
from dstune.data import prepare as preparation
from dstune.errors import ConfigError, DataError
from dstune.selection import choose, scores
from tests.data.test_prepare import files_of, make_config, record, rejects_of, require_sums, write_lines


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "run/data/a.jsonl", [record(number, number % 9 + 1) for number in range(60)])
    write_lines(tmp_path / "run/data/b.jsonl", [record(number, 3) for number in range(60, 80)])
    return tmp_path / "run"


def config_of(budget, by="random", seed=42, path="builtin:tiny-llama", **data):
    sources = [{"path": "data/a.jsonl"}, {"path": "data/b.jsonl"}]
    select = {"budget": budget, "by": by}
    return make_config(path, seed, **({"sources": sources} | data), select=select)


@pytest.mark.parametrize("by", ["random", "diversity"])
@pytest.mark.parametrize("path", ["builtin:tiny-llama", "builtin:tiny-t5"])
def test_a_budget_is_kept_and_the_rest_listed(base, by, path):
    choice = choose.choose(config_of(25, by, path=path, validation=0.1), base)
    chosen = choose.prepared(config_of(25, by, path=path, validation=0.1), base)
    chosen.verify()
    require_sums(chosen)
    assert chosen.num_examples == 25 == choice.chosen.sum()
    assert [chosen.origin(number) for number in range(25)] == [
        choice.base.origin(int(number)) for number in np.flatnonzero(choice.chosen)
    ]
    lines = rejects_of(chosen)
    left = np.flatnonzero(~choice.chosen)
    assert [one["reason"] for one in lines] == ["not_selected"] * len(left)
    rank = choice.table["rank"]
    assert all(f"rank {rank[number]} of 72" in one["detail"] for number, one in zip(left, lines, strict=True))
    assert sorted(rank) == list(range(1, 73)) and (rank[choice.chosen] <= 25).all()


def test_without_a_choice_it_is_the_preparation(base):
    config = make_config()
    assert choose.prepared(config, base).root == preparation.prepare(config, base).root


def test_scores_lie_beside_the_data_and_say_where_from(base):
    choice = choose.choose(config_of(10, "diversity"), base)
    assert choice.scores.parent == choice.base.root.parent and choice.scores.name.startswith(choice.base.root.name)
    table = scores.read(choice.scores)
    assert list(table) == [
        *("example", "source", "line", "part", "targets", "distance", "nearest", "rank", "chosen"),
    ]
    for number in (0, 59, 60, 79):
        example = choice.base.example(number)
        assert (table["source"][number], table["line"][number]) == (example.source, example.line)
        assert table["targets"][number] == example.loss_mask.sum()


def test_what_was_done_is_found_again(base, tmp_path, monkeypatch):
    config = config_of(12, "diversity")
    first = choose.prepared(config, base)
    with monkeypatch.context() as patched:
        patched.setattr(choose.diversity, "score", None)
        assert choose.prepared(config, base).root == first.root
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "elsewhere"))
    again = choose.prepared(config, base)
    assert again.root.name == first.root.name and files_of(again.root) == files_of(first.root)


def test_a_draw_follows_the_seed_and_grows_with_the_budget(base):
    def chosen(**settings):
        return set(np.flatnonzero(choose.choose(config_of(**settings), base).chosen))

    assert chosen(budget=20) < chosen(budget=30)
    assert chosen(budget=20) != chosen(budget=20, seed=1)
    assert len(chosen(budget=0.5)) == 40


def test_a_prepared_directory_serves_as_base(base):
    prepared = preparation.prepare(config_of(5), base)
    config = config_of(5, sources=[], prepared=str(prepared.root))
    chosen = choose.prepared(config, base)
    assert chosen.num_examples == 5 and chosen.manifest["selection"]["base"] == prepared.fingerprint


def test_budgets_that_cannot_be(base, caplog):
    with pytest.raises(DataError, match="less than one"):
        choose.choose(config_of(0.001), base)
    with pytest.raises(ConfigError, match="whole number"):
        choose.choose(config_of(2.5), base)
    with pytest.raises(ConfigError, match=r"data\.select: not there"):
        choose.choose(make_config(), base)
    whole = choose.prepared(config_of(1000), base)
    assert whole.num_examples == 80 and "all are taken" in caplog.text
    assert "selection" not in whole.manifest


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "builtin:tiny-t5"}, "sequence-to-sequence"),
        ({"train_on": "all"}, "train_on: all"),
    ],
)
def test_difficulty_is_refused_where_it_means_nothing(base, settings, message):
    with pytest.raises(ConfigError, match=message):
        choose.choose(config_of(5, "ifd", **settings), base)


RUN = "name: demo\nmodel: {path: builtin:tiny-llama}\ndata: {sources: [{path: data/a.jsonl}, {path: data/b.jsonl}]}\n"


def test_the_command_shows_what_training_takes(base, capsys):
    (base / "run.yaml").write_text(RUN)
    words = ["data.select.budget=20", "data.select.by=diversity"]
    assert main(["select", str(base / "run.yaml"), *words, "--json", "--count", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["examples"], found["chosen"]) == (80, 20)
    assert sum(file["chosen"] for file in found["sources"]) == 20
    assert [one["rank"] for one in found["taken"] + found["left"]] == [1, 2, 3, 21, 22, 23]
    assert all("Say number" in one["asked"] and "word" in one["answered"] for one in found["taken"])
    loaded = load_run(base / "run.yaml", words)
    assert str(api.prepare(loaded).root) == found["prepared"]
    assert main(["plan", str(base / "run.yaml"), *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prepared"] == found["prepared"]


def test_the_command_prints_nothing_that_drives_a_terminal(base, capsys):
    write_lines(base / "data/b.jsonl", [record("\x1b[31m[red]evil", 3), record("\u202ereversed", 2)])
    (base / "run.yaml").write_text(RUN)
    assert main(["select", str(base / "run.yaml"), "data.select.budget=61", "data.select.by=random", "--count=70"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\u202e" not in printed and "[red]" in printed
    assert "not_selected" not in printed and "61 of 62 examples" in printed


def test_the_command_says_what_is_missing(base, capsys):
    (base / "run.yaml").write_text(RUN)
    assert main(["select", str(base / "run.yaml")]) == 2
    assert "data.select.budget=5000" in capsys.readouterr().err
