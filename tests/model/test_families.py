"""Every family of models on its way through a run: built from its files, fed, updated, committed, exported, opened by transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedModel

from dstune.batch import collate
from dstune.checkpoint.commit import save
from dstune.config.schema import RunConfig
from dstune.data.task import packs
from dstune.data.tokenizer_files import BUILTIN_DIRECTORY
from dstune.engine.construction import DTYPES
from dstune.engine.parameters import local_piece
from dstune.engine.world import World
from dstune.errors import ConfigError
from dstune.exporting.huggingface import export
from dstune.model import freezing, names, text_side
from dstune.model.attention import choose
from dstune.model.build import build
from dstune.model.config import auto_class, load_config
from dstune.model.kernels import choice as kernels
from dstune.model.weights import WeightFiles
from dstune.paths import step_directory
from dstune.protocols import Slice
from tests.model.architectures import tiny
from tests.test_batch import Prepared

PACKED = [
    *("llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "t5", "t5-gated", "gemma4_text", "glm4_moe", "gpt_neo"),
]
RECURRENT = ["qwen3_next", "qwen3_5_text", "jamba", "zamba", "falcon"]
"""These, and what else is not packed."""
SEEING = ["gemma3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "mistral3", "qwen3_5"]


@pytest.fixture(scope="module")
def world():
    world = World()
    world.init()
    yield world
    dist.destroy_process_group()


def stage(number: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": number}}


def run_of(path: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "probe",
            "model": {"path": str(path), "dtype": "fp32", "tokenizer": str(BUILTIN_DIRECTORY)},
            "data": {"sources": [{"path": "builtin:instructions"}], "template": "chatml"},
        }
    )


@pytest.mark.parametrize("family", PACKED + RECURRENT + SEEING)
def test_a_family_goes_all_the_way(family: str, tmp_path: Path, world: World) -> None:
    original = tiny(family)
    original.save_pretrained(tmp_path / "model")
    run = run_of(tmp_path / "model")
    module, losses = _updated(run, family)
    assert losses[1] < losses[0]
    untouched = text_side.beside(module)
    assert bool(untouched) == (family in SEEING)
    for name, parameter in module.named_parameters():
        # Text passes all of what is trained, and nothing of what is not.
        assert (parameter.grad is None) == (name in untouched), name
        assert name not in untouched or torch.equal(parameter, original.get_parameter(name))
    checkpoint = _committed(module, run, tmp_path / "checkpoints", world)
    export(checkpoint, tmp_path / "out", run, Path(), dtype="fp32")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    opened, report = auto_class(config).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(opened) is type(original)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected = dict(module.named_parameters())
    for name, parameter in opened.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(("family", "dtype"), [("deepseek_v4", "bf16"), ("t5", "fp16"), ("zamba", "bf16")])
def test_an_export_has_the_types_that_transformers_writes(
    family: str, dtype: str, tmp_path: Path, world: World
) -> None:
    """Some parameters stay in fp32 beside 16 bits: routers, T5's outputs where they would overflow, Mamba's decays."""
    tiny(family).save_pretrained(tmp_path / "model")
    run = run_of(tmp_path / "model")
    module = build(run.model, Path(), "eager", 0, stage(1))
    export(_committed(module, run, tmp_path / "checkpoints", world), tmp_path / "ours", run, Path(), dtype=dtype)
    opened = auto_class(module.config).from_pretrained(tmp_path / "model", dtype=DTYPES[dtype])
    opened.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and {one.dtype for one in ours.values()} >= {DTYPES[dtype], torch.float32}
    for name, wanted in theirs.items():
        assert ours[name].dtype is wanted.dtype and torch.equal(ours[name], wanted), name
    assert AutoConfig.from_pretrained(tmp_path / "ours").dtype is DTYPES[dtype]


def _updated(run: RunConfig, family: str) -> tuple[PreTrainedModel, list[float]]:
    """The model after one update, as a worker would build it, and its loss before and after."""
    model, config = run.model, load_config(run.model, Path())
    seq2seq, layout = config.is_encoder_decoder, "packed"
    try:
        attention = choose(model, config, "packed-seq2seq" if seq2seq else "packed")
    except ConfigError as error:
        assert "data.packing" in str(error)
        layout, attention = "padded", choose(model, config, "padded")
    assert packs(model, Path()) == (layout == "packed") == (family not in (*RECURRENT, "qwen3_5"))
    batch = collate(Prepared(), [0, 1], "packed-seq2seq" if seq2seq else layout, pad_id=0)
    partitioned = build(model, Path(), attention, 0, stage(3))
    module = build(model, Path(), attention, 0, stage(1))
    for one, piece in zip(module.parameters(), partitioned.parameters(), strict=True):
        with local_piece(piece) as loaded:
            assert torch.equal(one.flatten(), loaded.tensor)
    freezing.freeze(module, [])
    loss = kernels.put_in(kernels.chosen(model, module, "cpu"), module, "cpu")
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, 1e-3), []
    for _ in range(2):
        optimizer.zero_grad()
        total, _ = loss(module, batch)
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return module, losses


def _committed(module: PreTrainedModel, run: RunConfig, folder: Path, world: World) -> Path:
    stored = names.saved_names(module)
    slices = [
        Slice("fp32", stored.get(name, name), tuple(parameter.shape), 0, parameter.detach().flatten())
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]
    frozen = freezing.frozen_digest(module, WeightFiles(Path(run.model.path))) if text_side.beside(module) else ""
    save(folder, 1, iter(slices), {"step": 1, "losses": [1.0], "frozen": frozen}, world.control(), {})
    return step_directory(folder, 1)
