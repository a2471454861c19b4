"""A run that begins with another run's weights: read from its checkpoint as they are there, by any world; refused where they differ."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dstune import api
from dstune.checkpoint.reader import Reader
from dstune.config.load import load_run
from dstune.errors import ConfigError
from dstune.launch import rundir
from dstune.paths import RunPaths, step_directory
from tests.runs.tiny import finished, metrics, state_hash, weights_hash, write_run

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.dist
def test_a_run_begins_where_another_stood(reference: RunPaths, tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        "next",
        model={"path": f"{reference.root}@6", "overrides": {}},
        train={"max_steps": 2, "lr": 1e-30, "warmup_steps": 0, "optimizer": "lion", "ema": 0.9, "seed": 7},
        checkpoint={"every": 1},
    )
    paths = finished(run, 1)
    begun = rundir.load(paths).config.model
    assert (begun.path, begun.start) == ("builtin:tiny-llama", str(step_directory(reference.checkpoints, 6)))
    assert weights_hash(paths, 2) == weights_hash(reference, 6) != weights_hash(reference, 12)
    assert state_hash(step_directory(paths.checkpoints, 2), "ema") == weights_hash(reference, 6)
    assert Reader(step_directory(paths.checkpoints, 2)).state["optimizer_steps"] == 2
    assert max(metrics(paths, "loss")) < metrics(reference, "loss")[0]
    api.export(paths.root, tmp_path / "before", step=0, dtype="fp32")
    with safe_open(tmp_path / "before" / "model.safetensors", "pt") as file:
        expected = Reader(step_directory(reference.checkpoints, 6)).read("fp32", NAME)
        assert torch.equal(file.get_tensor(NAME).flatten(), expected)


def _made(folder: Path, steps: tuple[int, ...], **sections: dict[str, Any]) -> RunPaths:
    """A run's directory with empty checkpoints: what can be known of it before they are read."""
    paths = rundir.create(load_run(write_run(folder, "first", **sections)))
    for step in steps:
        step_directory(paths.checkpoints, step).mkdir()
    return paths


def test_the_newest_step_is_taken_and_the_first_models_place_is_kept(tmp_path: Path) -> None:
    (tmp_path / "there" / "model").mkdir(parents=True)
    theirs = _made(tmp_path / "there", (3, 12), model={"path": "model", "overrides": {"hidden_size": 32}})
    model = load_run(
        write_run(tmp_path, model={"path": str(theirs.root.relative_to(tmp_path)), "overrides": {"a": 1}})
    ).config.model
    assert model.path == str(tmp_path / "there" / "model")
    assert model.start == str(step_directory(theirs.checkpoints, 12))
    assert model.overrides["hidden_size"] == 32 and model.overrides["a"] == 1
    with pytest.raises(ConfigError, match=r"no committed step 5 .*one of: 3, 12"):
        load_run(write_run(tmp_path, model={"path": f"{theirs.root}@5"}))
    theirs.env.write_text("{}")
    with pytest.raises(ConfigError, match=r"env\.json cannot be read"):
        load_run(write_run(tmp_path, model={"path": str(theirs.root)}))


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ({"model": {"adapter": {"rank": 4}}}, {}, "trained an adapter of a random model, and this run has none"),
        ({"model": {"new_tokens": ["kPa"]}}, {"model": {"new_tokens": ["hPa"]}}, "other `model.new_tokens`"),
        ({"model": {"adapter": {"rank": 4}}}, {"model": {"adapter": {"rank": 8}}}, "trained another adapter"),
        ({}, {"model": {"adapter": {"rank": 8}}}, "trained no adapter"),
    ],
)
def test_other_parameters_are_refused_with_what_to_do(tmp_path: Path, theirs: Any, ours: Any, words: str) -> None:
    first = _made(tmp_path / "there", (3,), **theirs)
    own = {"model": {**ours.get("model", {}), "path": str(first.root), "overrides": {}}}
    with pytest.raises(ConfigError, match=f"(?s)model.path: .*{words}.*dstune export"):
        load_run(write_run(tmp_path, **own))
    same = {"model": {**theirs.get("model", {}), "path": str(first.root), "overrides": {}}}
    assert load_run(write_run(tmp_path, **same)).config.model.start is not None
