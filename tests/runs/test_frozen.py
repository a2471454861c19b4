"""A run with frozen weights: they are in no checkpoint, come back from the base model on any world, and from no other model."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from dstune import api
from dstune.checkpoint.reader import Reader
from dstune.config.schema import ModelSection
from dstune.data.tokenizer_files import BUILTIN_DIRECTORY
from dstune.errors import UsageError
from dstune.exporting.huggingface import export
from dstune.launch import rundir
from dstune.model.config import load_config
from dstune.paths import step_directory
from tests.runs.tiny import TINY_LLAMA, drive, metrics, write_run

pytestmark = pytest.mark.dist

EMBEDDING = "model.embed_tokens.weight"


def _base_model(directory: Path) -> torch.Tensor:
    """A model in files; its embedding."""
    config = load_config(ModelSection(path="builtin:tiny-llama", overrides=TINY_LLAMA), Path())
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    return model.get_parameter(EMBEDDING).detach()


def test_a_run_leaves_frozen_weights_alone_and_wants_them_back(tmp_path: Path) -> None:
    embedding = _base_model(tmp_path / "model")
    run = write_run(
        tmp_path,
        model={"path": str(tmp_path / "model"), "tokenizer": str(BUILTIN_DIRECTORY), "overrides": {}},
        train={"max_steps": 2, "optimizer": "lion", "lr": 3e-4, "freeze": ["*.embed_tokens.*"]},
    )
    assert drive(run, 2, new=True).state == "succeeded"
    paths = rundir.find(run)
    rundir.change(paths, ["cluster.workers=1", "deepspeed.preset=zero1", "train.max_steps=6"])
    assert drive(paths.root, 1, new=False).state == "succeeded"
    assert metrics(paths, "loss")[-1] < metrics(paths, "loss")[0]

    checkpoint = step_directory(paths.checkpoints, 6)
    assert EMBEDDING not in Reader(checkpoint).tensors("fp32")
    loaded = rundir.load(paths)
    export(checkpoint, tmp_path / "out", loaded.config, loaded.base, dtype="fp32")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(EMBEDDING), embedding)

    with pytest.raises(UsageError, match="trained the model itself, not an adapter"):
        api.export(paths.root, tmp_path / "merged", merged=True)

    _base_model(tmp_path / "model")  # other random weights
    rundir.change(paths, ["train.max_steps=8"])
    end = drive(paths.root, 1, new=False)
    assert end.state == "failed" and "`train.freeze` leaves as they are differ" in str(end)
