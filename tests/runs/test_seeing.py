"""A run of a model that sees too, with tokens of its own: the language model is trained and grows, all else goes through untouched."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoTokenizer

from dstune import api
from dstune.checkpoint.reader import Reader
from dstune.config.load import load_run
from dstune.data.preview.directory import opened
from dstune.data.tokenizer_files import BUILTIN_DIRECTORY
from dstune.errors import ConfigError
from dstune.launch import rundir, start
from dstune.model.text_side import beside
from dstune.paths import step_directory
from tests.model.architectures import tiny_config, tiny_of
from tests.runs.tiny import drive, metrics, write_run
from tests.spawn import read_lines

SIZE = 666
"""Of the builtin tokenizer, and so of the model's embeddings: no room."""
NEW = {"plain": ["kilopascal"], "special": ["<|unit|>"]}


def _run(folder: Path, **sections: dict) -> Path:
    config = tiny_config("gemma3")
    config.get_text_config().vocab_size = SIZE
    model = tiny_of(config).to(torch.bfloat16)
    model.get_submodule("model.vision_tower").float()  # a type of its own, which an export keeps
    model.save_pretrained(folder / "model")
    (folder / "model" / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    record = {"messages": [{"role": "user", "content": "p?"}, {"role": "assistant", "content": "5 kilopascal"}]}
    (folder / "data.jsonl").write_text((json.dumps(record) + "\n") * 8)
    section = {"path": str(folder / "model"), "tokenizer": str(BUILTIN_DIRECTORY), "overrides": {}, "new_tokens": NEW}
    return write_run(
        folder,
        model=section | sections.get("model", {}),
        data={"sources": [{"path": str(folder / "data.jsonl")}]},
        train={"max_steps": 4, "lr": 1e-3, "warmup_steps": 0} | sections.get("train", {}),
        checkpoint={"every": 2},
        deepspeed={"preset": "zero3", "overrides": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
    )


@pytest.mark.dist
def test_the_language_model_is_trained_and_grows_and_all_else_is_untouched(tmp_path: Path) -> None:
    run = _run(tmp_path, train={"max_steps": 2})
    assert drive(run, 2, new=True).state == "succeeded"
    paths = rundir.find(run)
    changes = ["cluster.workers=1", "deepspeed.preset=zero1", "deepspeed.overrides={}", "train.max_steps=4"]
    rundir.change(paths, changes)
    assert drive(paths.root, 1, new=False).state == "succeeded"
    assert metrics(paths, "loss")[-1] < metrics(paths, "loss")[0]
    prepared, tokenizer = opened(rundir.environment(paths)["prepared"]["directory"])
    assert prepared.example(0).input_ids.tolist().count(SIZE) == 1 and tokenizer.decode([SIZE]) == "kilopascal"

    api.export(paths.root, tmp_path / "out")
    model, report = AutoModelForMultimodalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(model).__name__ == "Gemma3ForConditionalGeneration"
    assert model.config.text_config.vocab_size == SIZE + 2 == len(AutoTokenizer.from_pretrained(tmp_path / "out"))
    assert (tmp_path / "out" / "preprocessor_config.json").read_bytes() == (
        tmp_path / "model" / "preprocessor_config.json"
    ).read_bytes()
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    untouched = beside(model)
    same = {
        name
        for name in before
        if (before[name].dtype, before[name].tolist()) == (after[name].dtype, after[name].tolist())
    }
    stored = {name for name in before if "vision_tower" in name or "multi_modal_projector" in name}
    assert same == stored and len(stored) == len(untouched) > 0
    masters = Reader(step_directory(paths.checkpoints, 4))
    assert set(masters.tensors("fp32")) == set(before) - stored
    embedding = next(name for name in before if name.endswith("embed_tokens.weight"))
    mean = before[embedding].double().mean(0)
    seen, unseen = masters.read("fp32", embedding).view(SIZE + 2, -1)[SIZE:]
    assert 0 < float((seen - mean).abs().max()) < 0.05, "trained from the mean on"
    assert float((unseen - mean).abs().max()) < 0.01
    assert len([event for event in read_lines(paths.events) if event["event"] == "attempt_started"]) == 2


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"adapter": {"rank": 2}}},
        {"train": {"freeze": ["*.embed_tokens.*"]}},
    ],
)
def test_new_tokens_that_would_not_be_trained_are_refused(tmp_path: Path, sections: dict) -> None:
    with pytest.raises(ConfigError, match=r"new_tokens: .*embed_tokens.* would not be trained"):
        start.check(load_run(_run(tmp_path, **sections)))
