import os

import numpy as np
import pytest

from dstune.data import prepare
from dstune.data.derive import derive
from dstune.data.shards import Prepared
from dstune.errors import DataError
from dstune.paths import PreparedPaths
from tests.data.test_prepare import files_of, make_config, record, rejects_of, require_sums, write_lines


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "cache"))
    write_lines(tmp_path / "run/data/a.jsonl", [record(number, number % 9 + 1) for number in range(60)] + ["{broken"])
    write_lines(tmp_path / "run/data/b.jsonl", [record(number, 3) for number in range(60, 80)])
    return tmp_path / "run"


def config_of(**data):
    sources = [{"path": "data/a.jsonl"}, {"path": "data/b.jsonl", "repeat": 2.5}]
    return make_config(**{"sources": sources, "bad_rows": "skip", **data})


def every_third(prepared):
    return np.arange(prepared.num_examples) % 3 == 0


def derived(prepared, keep, **selection):
    return derive(prepared, keep, name="demo", selection={"by": "test", **selection}, detail=lambda n: f"number {n}")


@pytest.mark.parametrize("packing", [True, False])
def test_the_chosen_examples_and_nothing_else(base, packing):
    prepared = prepare.prepare(config_of(packing=packing), base)
    keep = every_third(prepared)
    chosen = derived(prepared, keep)
    chosen.verify()
    require_sums(chosen)
    assert chosen.root.parent == prepared.root.parent and chosen.root != prepared.root
    assert [path.name for path in chosen.root.parent.glob(".*")] == []
    for new, old in enumerate(np.flatnonzero(keep)):
        ours, theirs = chosen.example(new), prepared.example(int(old))
        assert ours.input_ids.tolist() == theirs.input_ids.tolist()
        assert ours.loss_mask.tolist() == theirs.loss_mask.tolist()
        assert (ours.source, ours.line, ours.part) == (theirs.source, theirs.line, theirs.part)
    assert chosen.num_examples == keep.sum() == 27
    counts = chosen.manifest["counts"]
    assert counts["tokens"] == sum(file["tokens"] for file in chosen.manifest["sources"])
    assert counts["supervised_tokens"] == sum(file["supervised_tokens"] for file in chosen.manifest["sources"])
    assert counts["epoch_tokens"] == chosen.rows_tokens.sum()
    assert chosen.manifest["selection"] == {"by": "test", "base": prepared.fingerprint}


def test_each_one_left_out_has_its_line(base):
    prepared = prepare.prepare(config_of(), base)
    keep = every_third(prepared)
    rejects = rejects_of(derived(prepared, keep))
    assert rejects[0] == rejects_of(prepared)[0]
    assert [(one["reason"], one["detail"]) for one in rejects[1:]] == [
        ("not_selected", f"number {number}") for number in np.flatnonzero(~keep)
    ]
    assert [f"{one['file']}:{one['line']}" for one in rejects[1:]] == [
        prepared.origin(int(number)) for number in np.flatnonzero(~keep)
    ]


def test_the_epoch_follows_repeat_and_seed(base):
    prepared = prepare.prepare(config_of(), base)
    chosen = derived(prepared, every_third(prepared))
    epoch = np.concatenate([chosen.row(row) for row in range(chosen.num_rows)])
    times = np.bincount(epoch, minlength=27)
    # 20 of a.jsonl once; 7 of b.jsonl twice, and 4 of them (3.5, halves upwards) a third time.
    assert times[:20].tolist() == [1] * 20 and sorted(times[20:].tolist()) == [2, 2, 2, 3, 3, 3, 3]
    assert [(source["examples"], source["examples_per_epoch"]) for source in chosen.manifest["source_settings"]] == [
        (20, 20),
        (7, 18),
    ]


def test_a_temperature_evens_the_sources_that_are_left(base):
    prepared = prepare.prepare(
        config_of(sources=[{"path": f"data/{name}.jsonl"} for name in "ab"], temperature=100), base
    )
    keep = np.arange(80) < 70  # 60 and 10: nearly as many of each come in an epoch of 70
    listed = derived(prepared, keep).manifest["source_settings"]
    assert [source["examples"] for source in listed] == [60, 10]
    assert [source["examples_per_epoch"] for source in listed] == pytest.approx([35, 35], abs=1)


def test_datasets_opens_it_and_validation_is_untouched(base):
    import datasets

    prepared = prepare.prepare(config_of(validation=0.2), base)
    chosen = derived(prepared, every_third(prepared))
    chosen.verify()
    require_sums(chosen)
    assert files_of(chosen.root / "validation") == files_of(prepared.root / "validation")
    assert datasets.load_from_disk(str(chosen.root)).num_rows == chosen.num_examples
    held_out, theirs = chosen.validation(), prepared.validation()
    assert held_out is not None and theirs is not None and held_out.fingerprint == theirs.fingerprint


def test_validation_is_copied_where_links_cannot_be(base, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    prepared = prepare.prepare(config_of(validation=0.2), base)
    monkeypatch.setattr(os, "link", refuse)
    made = derived(prepared, every_third(prepared))
    made.verify()
    theirs, ours = (PreparedPaths(one.root).validation / "manifest.json" for one in (prepared, made))
    assert ours.read_bytes() == theirs.read_bytes() and ours.stat().st_ino != theirs.stat().st_ino


def test_the_same_choice_gives_the_same_bytes(base, tmp_path, monkeypatch):
    prepared = prepare.prepare(config_of(validation=0.2), base)
    keep = every_third(prepared)
    first = derived(prepared, keep)
    assert derived(prepared, keep).root == first.root
    monkeypatch.setenv("DSTUNE_CACHE", str(tmp_path / "elsewhere"))
    again = derived(Prepared.open(prepared.root), keep)
    assert again.root.name == first.root.name and files_of(again.root) == files_of(first.root)
    assert derived(prepared, ~keep).root.name != first.root.name
    assert derived(prepared, keep, budget=3).root.name != first.root.name


def test_all_or_nothing(base):
    prepared = prepare.prepare(config_of(), base)
    assert derived(prepared, np.ones(prepared.num_examples, dtype=bool)) is prepared
    with pytest.raises(DataError, match="no example is left"):
        derived(prepared, np.zeros(prepared.num_examples, dtype=bool))
    with pytest.raises(ValueError, match="among 3 examples"):
        derived(prepared, np.ones(3, dtype=bool))
    assert {path.name for path in prepared.root.parent.iterdir()} == {prepared.root.name}
