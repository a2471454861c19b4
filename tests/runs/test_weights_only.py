"""Checkpoints of the weights (and their average) alone: a resume goes on from the same weights, and says that its optimizer begins anew."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from dstune import api
from dstune.checkpoint.reader import Reader
from dstune.errors import UsageError
from dstune.paths import step_directory
from tests.runs.test_adapters import go_back_to
from tests.runs.tiny import drive, finished, metrics, write_run
from tests.spawn import read_lines

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.dist
def test_the_weights_are_kept_and_the_optimizer_is_not(tmp_path: Path) -> None:
    run = write_run(
        tmp_path, train={"max_steps": 6, "ema": 0.5, "neftune_alpha": 5.0}, checkpoint={"weights_only": True}
    )
    paths = finished(run, 1)
    losses = metrics(paths, "loss")
    saved = Reader(step_directory(paths.checkpoints, 3))
    assert set(saved.manifest.tensors) == {"fp32", "ema"} and saved.state["optimizer_steps"] == 3
    go_back_to(paths, 3, "checkpoint.weights_only=false")
    assert drive(paths.root, 1, new=False).state == "succeeded"
    again = metrics(paths, "loss")
    assert again[:4] == losses[:4] and again[4] != losses[4]
    restarted = [event for event in read_lines(paths.events) if event["event"] == "optimizer_restarted"]
    assert [event["step"] for event in restarted] == [3]
    whole = Reader(step_directory(paths.checkpoints, 6))
    assert (
        set(whole.manifest.tensors) == {"fp32", "ema", "exp_avg", "exp_avg_sq"} and whole.state["optimizer_steps"] == 3
    )
    for weights in ("fp32", "ema"):
        api.export(paths.root, tmp_path / weights, weights=weights, dtype="fp32")
        with safe_open(tmp_path / weights / "model.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor(NAME).flatten(), whole.read(weights, NAME))
    assert not torch.equal(whole.read("fp32", NAME), whole.read("ema", NAME))
    with pytest.raises(UsageError, match="'exp_avg'"):
        api.export(paths.root, tmp_path / "other", weights="exp_avg")
