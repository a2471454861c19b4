"""What is cut, and the proof that an architecture computes and learns the same when two hold it."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from dstune.config.schema import ModelSection
from dstune.engine import tensor_parallel as engine
from dstune.engine.construction import DTYPES
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.errors import ConfigError
from dstune.model import build, freezing, tensor_parallel
from dstune.model.build import skeleton
from dstune.model.weights import WeightFiles
from tests.model.architectures import tiny, tiny_config
from tests.spawn import run_workers

SECTION = ModelSection(path="somewhere", dtype="fp32")


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "granite", "cohere", "gemma3"]
)
def test_what_transformers_has_a_plan_for_can_be_held_by_two(kind: str) -> None:
    tensor_parallel.prove(SECTION, tiny_config(kind), 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers.*.self_attn.q_norm": "replicate"}, "q_norm.weight of its small model gets another gradient"),
        ({"layers.*.mlp.up_proj": "replicate"}, "fails when it is held by two"),
        ({"layers.*.self_attn.o_proj": "replicate"}, "fails when it is held by two"),
        ({"layers.*.mlp.experts": "grouped_gemm"}, "AutoTP does not cut as transformers' plan for it says"),
    ],
)
def test_a_plan_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch, change: dict[str, str], words: str) -> None:
    config = tiny_config("qwen3")
    monkeypatch.setattr(type(config), "base_model_tp_plan", type(config).base_model_tp_plan | change)
    tensor_parallel._disproof.cache_clear()
    with pytest.raises(ConfigError, match=words):
        tensor_parallel.prove(SECTION, config, 2)
    tensor_parallel._disproof.cache_clear()


def test_the_head_and_the_embeddings_stay_whole() -> None:
    config = tiny_config("qwen3")
    split = engine.split_of(skeleton(config, SECTION), config, 2)
    assert len(split.columns) == 2 * 5 and len(split.rows) == 2 * 2 and len(split.summed) == 2 * 2
    assert not [name for name in (*split.columns, *split.rows) if "head" in name or "embed" in name]


FROZEN = "model.layers.0"


def _halves(folder: Path, dtype: str, ids: torch.Tensor) -> tuple[list[str], torch.Tensor]:
    """Which parameters were read before the model was cut, and its logits."""
    world = World.from_environment()
    world.init(60)
    config = {"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}}
    section, read = ModelSection(path=str(folder), dtype=dtype), []
    with mock.patch.object(WeightFiles, "read_range", autospec=True, side_effect=WeightFiles.read_range) as reading:
        module = build.build(section, Path(), "eager", 0, config, [f"{FROZEN}.*"])
        read = sorted({call.args[1] for call in reading.call_args_list})
    for name, parameter in module.named_parameters():
        if name not in read:
            parameter.data.fill_(torch.nan)  # as bad as memory may be that nobody wrote
    freezing.freeze(module, [f"{FROZEN}.*"])
    made = ZeroEngine(module, lr=1e-3, ds_config=config, world=world, optimizer="sgd", momentum=0.9)
    fill = build.masters_from_files(made.module.module, section, Path())
    assert fill is not None
    made.load(fill, 0)
    with torch.no_grad():
        logits = made.module.module.eval()(input_ids=ids, use_cache=False).logits
    world.close()
    return read, logits


@pytest.mark.dist
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_member_reads_its_part_of_a_matrix_once_it_is_cut(tmp_path: Path, dtype: str) -> None:
    whole = tiny("qwen2").to(DTYPES[dtype])
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # biases begin with zeros
    whole.save_pretrained(tmp_path)
    ids = torch.arange(1, 12)[None]
    wanted = whole.eval()(input_ids=ids, use_cache=False).logits.detach()
    layers = {name for name, _ in whole.named_parameters() if name.startswith("model.layers.")}
    for read, found in run_workers(_halves, 2, tmp_path, dtype, ids):
        assert {name for name in layers if "norm" in name or name.startswith(FROZEN)} == layers & set(read)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 if dtype == "fp32" else 0.05)
