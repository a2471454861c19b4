"""Runs that train an adapter: started, stopped, gone on with in other worlds and ZeRO stages, exported, refused beside other weights."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dstune import api
from dstune.checkpoint.reader import Reader
from dstune.config.load import load_run
from dstune.data.conversation import Conversation, Message
from dstune.errors import ConfigError, UsageError
from dstune.generate import Settings, generate
from dstune.launch import rundir, start
from dstune.model.open import open_model
from dstune.paths import RunPaths, step_directory
from tests.evaluation.models import save_llama
from tests.runs.tiny import drive, finished, metrics, weights_hash, write_run
from tests.spawn import read_lines

pytestmark = pytest.mark.dist


def run_file(folder: Path, model: dict[str, Any], **adapter: Any) -> Path:
    """Eight steps on a tiny Llama of its own, ZeRO-3 with nothing small enough to stay whole."""
    path = save_llama(folder / "model", spread=0.1)
    return write_run(
        folder,
        model={"path": str(path), "overrides": {}, "adapter": {"rank": 4, **adapter}, **model},
        train={"max_steps": 8, "lr": 1e-2},
        checkpoint={"every": 4},
        deepspeed={"preset": "zero3", "overrides": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
    )


def go_back_to(paths: RunPaths, step: int, *overrides: str) -> None:
    """Take the run back to a committed step, with other settings from there on."""
    for record in read_lines(paths.metrics):
        directory = step_directory(paths.checkpoints, record["step"])
        if record["step"] > step and directory.is_dir():
            shutil.rmtree(directory)
    rundir.change(paths, list(overrides))


def test_an_adapter_goes_on_in_any_world_and_stage(tmp_path: Path) -> None:
    paths = finished(run_file(tmp_path, {"dtype": "fp32"}, kind="dora", modules_to_save=["lm_head"]))
    losses, weights = metrics(paths, "loss"), weights_hash(paths, 8)
    half = Reader(step_directory(paths.checkpoints, 4))
    assert all(name.startswith("base_model.model.") for name in half.tensors("fp32"))
    assert len(half.tensors("fp32")) == 14 * 3 + 1 == len(half.tensors("exp_avg"))
    assert half.manifest.fingerprints["base"]["path"] == str(tmp_path / "model")
    go_back_to(paths, 4)
    assert drive(paths.root, 2, new=False).state == "succeeded"
    assert metrics(paths, "loss") == losses and weights_hash(paths, 8) == weights
    alike = {"kind": "dora", "rank": 4, "modules_to_save": ["lm_head"]}
    model = {"path": f"{paths.root}@8", "overrides": {}, "dtype": "fp32", "adapter": alike}
    begun = finished(write_run(tmp_path, "next", model=model, train={"max_steps": 1, "lr": 1e-30}), 1)
    assert weights_hash(begun, 1) == weights
    api.export(paths.root, tmp_path / "merged", step=8, merged=True, dtype="fp32")
    model = {"path": f"{paths.root}@8", "overrides": {}, "dtype": "fp32"}
    whole = finished(write_run(tmp_path, "whole", model=model, train={"max_steps": 1, "lr": 1e-30}), 2)
    api.export(whole.root, tmp_path / "before", step=0, dtype="fp32")
    for name, wanted in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert torch.equal(Reader(step_directory(whole.checkpoints, 1)).read("fp32", name).view_as(wanted), wanted)
        assert torch.equal(load_file(tmp_path / "before" / "model.safetensors")[name], wanted)
    for world, preset in ((1, "zero2"), (3, "zero1")):
        go_back_to(paths, 4, f"deepspeed.preset={preset}", "deepspeed.overrides={}", f"cluster.workers={world}")
        assert drive(paths.root, world, new=False).state == "succeeded"
        assert metrics(paths, "loss") == pytest.approx(losses, rel=1e-4)
        assert metrics(paths, "world") == [2] * 4 + [world] * 4


def test_a_run_becomes_an_adapter_that_dstune_opens_and_goes_with_no_other_base(tmp_path: Path) -> None:
    run = run_file(tmp_path, {"dtype": "bf16", "activation_checkpointing": True}, kind="dora", dropout=0.2)
    paths = finished(run, 1)
    losses = metrics(paths, "loss")
    assert losses[-1] < losses[0]
    go_back_to(paths, 4, "deepspeed.preset=zero1", "deepspeed.overrides={}")
    assert drive(paths.root, 1, new=False).state == "succeeded"
    assert metrics(paths, "loss") == pytest.approx(losses, rel=2e-3)
    out = api.export(paths.root)
    opened = open_model(str(paths.root), device="cpu")
    assert out == paths.export and opened.dtype == "fp32", "as the base model's files"
    with pytest.raises(UsageError, match="With --merged"):
        api.export(paths.root, tmp_path / "whole", to="deepspeed-fp32")
    with pytest.raises(UsageError, match="is one file"):
        api.export(paths.root, tmp_path / "whole", max_shard_size="1GB")
    api.export(paths.root, tmp_path / "whole", merged=True)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        one = opened.module(input_ids=ids).logits
        other = open_model(str(tmp_path / "whole"), device="cpu").module(input_ids=ids).logits
        before = open_model(str(tmp_path / "model"), device="cpu").module(input_ids=ids).logits
    (answer,) = generate(opened, [opened.prompts([Conversation((Message("user", "2 + 2?"),))])[0].ids], Settings(4))
    assert 0 < answer.num_tokens <= 4
    changed = float((one - before).abs().max())
    assert changed > 0.05 and float((one - other).abs().max()) < changed / 10
    save_llama(tmp_path / "model", spread=0.11)
    go_back_to(paths, 4)
    end = drive(paths.root, 1, new=False, max_failures=3)
    assert end.state == "failed" and "the same base model, unchanged" in end.message
    assert len([event for event in read_lines(paths.events) if event["event"] == "attempt_started"]) == 3


def test_deepspeeds_checkpoints_are_not_imported_beside_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.adapter: .* trains an adapter"):
        api.import_deepspeed(run_file(tmp_path, {}), tmp_path)


def test_what_fits_no_layer_is_found_before_anything_is_prepared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'q_prj' fits no linear layer; expected `q_proj`"):
        start.check(load_run(run_file(tmp_path, {}, targets=["q_prj"])))
