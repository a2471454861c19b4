"""A run whose two workers hold the model between them: the losses, the data and the checkpoints of a run whose worker has all of it."""

import json
from pathlib import Path

import pytest

from dstune.config.load import load_run
from dstune.errors import ConfigError, FitError
from dstune.launch import start
from tests.runs.test_adapters import go_back_to
from tests.runs.tiny import drive, finished, metrics, weights_hash, write_run
from tests.spawn import read_lines

SECTIONS = {
    "model": {"dtype": "fp32", "activation_checkpointing": True},
    "data": {"validation": 0.1},
    "train": {"max_steps": 6, "ema": 0.9, "neftune_alpha": 5.0},
    "validate": {"every": 3},
}


@pytest.mark.dist
def test_losses_data_and_checkpoints_do_not_depend_on_how_many_hold_the_model(tmp_path: Path) -> None:
    alone = finished(write_run(tmp_path / "alone", **SECTIONS, cluster={"workers": 1}), 1)
    paths = finished(write_run(tmp_path / "two", **SECTIONS, cluster={"workers": 2, "tensor_parallel": 2}), 2)
    plan = json.loads(paths.plan(1).read_text())
    assert (plan["preset"], plan["tensor_parallel"], plan["micro_batches"]) == ("zero1", 2, 2)
    wanted = metrics(alone, "loss")
    for name in ("batch_digest", "tokens", "supervised_tokens", "rows", "epoch"):
        assert metrics(paths, name) == metrics(alone, name)
    assert metrics(paths, "loss") == pytest.approx(wanted, rel=1e-5)
    assert metrics(paths, "grad_norm") == pytest.approx(metrics(alone, "grad_norm"), rel=1e-4)
    held_out = [[record["loss"] for record in read_lines(one.evaluations)] for one in (alone, paths)]
    assert len(held_out[0]) == 3 and held_out[1] == pytest.approx(held_out[0], rel=1e-5)

    losses, weights = metrics(paths, "loss"), weights_hash(paths, 6)
    go_back_to(paths, 3)
    assert drive(paths.root, 2, new=False).state == "succeeded"
    assert (metrics(paths, "loss"), weights_hash(paths, 6)) == (losses, weights)
    go_back_to(paths, 3, "cluster.workers=1", "cluster.tensor_parallel=1")
    assert drive(paths.root, 1, new=False).state == "succeeded"
    assert metrics(paths, "world") == [2, 2, 2, 1, 1, 1]
    assert metrics(paths, "loss") == pytest.approx(wanted, rel=1e-5)


@pytest.mark.dist
def test_deepspeeds_own_word_does_and_only_whole_pairs_are_taken(tmp_path: Path) -> None:
    """Three workers can be placed, and two of them hold the model."""
    own = {"preset": "zero2", "overrides": {"tensor_parallel": {"autotp_size": 2}}}
    few = SECTIONS | {"train": {"max_steps": 3}, "deepspeed": own, "cluster": {"workers": [2, 4]}}
    paths = finished(write_run(tmp_path / "pairs", **few), 3)
    assert metrics(paths, "world") == [2, 2, 2]
    assert load_run(paths.config).config.cluster.tensor_parallel == 2


def test_what_does_not_go_with_it_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    run = write_run(tmp_path, cluster={"workers": 2, "tensor_parallel": 2})
    start.check(load_run(run))
    with pytest.raises(ConfigError, match="wants a multiple of so many workers"):
        load_run(run, ["cluster.workers=3"])
    refused = {
        "deepspeed.preset=zero3": r"stage: 3, with cluster\.tensor_parallel: 2; expected 1 or 2",
        "cluster.sequence_parallel=2": r"cluster\.sequence_parallel: on, with",
        "model.adapter={}": r"model\.adapter: set, with",
        "model.compile=layers": r"model\.compile: 'layers', with",
        "train.optimizer=muon": r"train\.optimizer: 'muon', which wants to see whole matrices",
        "deepspeed.overrides={tensor_parallel: {autotp_size: 4}}": r"autotp_size: 4, with cluster\.tensor_parallel: 2",
        "deepspeed.overrides={tensor_parallel: {vocab_parallel_lm_head: true}}": r"vocab_parallel_lm_head: is set",
        "model={path: builtin:tiny-t5}": "transformers has no plan for the matrices of t5",
    }
    for change, words in refused.items():
        with pytest.raises(ConfigError, match=words):
            start.check(load_run(run, [change]))
    with pytest.raises(
        ConfigError, match=r"4 workers for the model's 2 heads \(num_key_value_heads\); expected one of 1, 2"
    ):
        start.check(load_run(run, ["cluster.workers=4", "cluster.tensor_parallel=4"]))
    with pytest.raises(FitError, match="4 rows for 20 workers in groups of 2"):
        start.check(load_run(run, ["cluster.workers=20"]))
