"""What is cut, and the proof that an architecture computes and learns the same when two hold it."""

import pytest

from dstune.config.schema import ModelSection
from dstune.engine import tensor_parallel as engine
from dstune.errors import ConfigError
from dstune.model import tensor_parallel
from dstune.model.build import skeleton
from tests.model.architectures import tiny_config

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
