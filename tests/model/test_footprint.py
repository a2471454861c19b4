"""What is counted without weights is what a model with weights has and keeps."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dstune.config.schema import ModelSection
from dstune.model.config import load_config
from dstune.model.footprint import footprint
from dstune.model.kernels import linear_cross_entropy
from dstune.planning import memory
from dstune.planning.shapes import ModelShape
from tests.model.architectures import tiny_config

SHAPE = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 500, "tie_word_embeddings": False,
}  # fmt: skip


def test_the_planner_knows_how_many_logits_the_fused_loss_holds():
    assert memory._FUSED_CHUNK == linear_cross_entropy._CHUNK_BYTES  # it stands on a lower floor, and cannot ask


def test_parameters_of_a_llama_are_its_matrices():
    found = footprint(ModelSection(path="builtin:tiny-llama", overrides=SHAPE), Path())
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160 + 2 * 64
    assert found.parameters == found.trained == 3 * layer + 2 * 500 * 64 + 64
    assert found.largest_layer == layer and found.layers == 3
    assert found.active == 3 * (layer - 2 * 64) + 500 * 64  # no norms, and of the embeddings the head alone
    assert found.no_larger_than(64) == 7 * 64


def test_a_tied_embedding_is_the_head_and_counts_once():
    found = footprint(ModelSection(path="builtin:tiny-llama", overrides=SHAPE | {"tie_word_embeddings": True}), Path())
    apart = footprint(ModelSection(path="builtin:tiny-llama", overrides=SHAPE), Path())
    assert found.parameters == apart.parameters - 500 * 64
    assert found.active == apart.active


@pytest.mark.parametrize("name", ["falcon", "gpt_neo", "gemma4_text", "modernbert-decoder"])
def test_models_unlike_others_are_counted(name, tmp_path):
    """One that knows no attention but its own, one whose config says null for a width, one whose layers differ, one that must pad."""
    config = AutoConfig.for_model(name, num_hidden_layers=3) if name == "modernbert-decoder" else tiny_config(name)
    config.save_pretrained(tmp_path)
    found = footprint(ModelSection(path=str(tmp_path)), tmp_path)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    assert found.parameters == sum(parameter.numel() for parameter in whole.parameters())
    assert found.layers == config.num_hidden_layers and found.layer_activations > 0
    assert found.attention_width == (4 * 16 if name == "gemma4_text" else config.hidden_size)


def test_what_freezes_is_not_trained():
    model = ModelSection(path="builtin:tiny-llama", overrides=SHAPE)
    found = footprint(model, Path(), ["model.embed_tokens.*"])
    assert found.trained == found.parameters - 500 * 64


def test_an_adapter_alone_is_trained():
    model = ModelSection.model_validate({"path": "builtin:tiny-llama", "overrides": SHAPE, "adapter": {"rank": 4}})
    found = footprint(model, Path())
    assert 0 < found.trained < found.parameters / 4
    # In 16 bits as the rest: no fp32 copy of any layer's input is kept for it, and frozen matrices keep none at all.
    whole = footprint(ModelSection(path="builtin:tiny-llama", overrides=SHAPE), Path())
    assert found.layer_activations < 1.1 * whole.layer_activations and not found.head_trained


def test_compiled_layers_keep_what_products_and_attention_read_and_make():
    found = footprint(ModelSection(path="builtin:tiny-llama", overrides=SHAPE, compile="layers"), Path())
    attended = 2 * (64 + 32 + 32 + 64)
    products = 2 * (64 + 64 + 3 * 160)  # the norms' results, the gate, what it gates, and their product
    assert found.compiled_activations == attended + products + 2 * 2 * 64  # and the layer's two sums
    assert found.compiled_activations < found.layer_activations


def test_products_in_8_bits_keep_a_byte_of_what_they_read():
    """The down projection's 160 numbers are kept for it alone; the norms' results, of 64 numbers, are kept once more."""
    plain, rounded = (
        footprint(ModelSection(path="builtin:tiny-llama", overrides=SHAPE, fp8=on), Path()).layer_activations
        for on in (False, True)
    )
    assert plain - rounded == 160 - 2 * 64


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_counted_activations_are_those_that_autograd_keeps_of_a_real_model(dtype):
    """The real model's attention keeps what a kernel of torch keeps; the count reckons with flash attention's."""
    tokens = 256
    model = ModelSection(path="builtin:tiny-llama", overrides=SHAPE, dtype=dtype)
    found = footprint(model, Path())
    module = AutoModelForCausalLM.from_config(
        load_config(model, Path()),
        dtype=torch.bfloat16 if dtype == "bf16" else torch.float32,
        attn_implementation="sdpa",
    )
    weights = {parameter.data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = module.model(input_ids=torch.randint(0, 500, (1, tokens)), use_cache=False)
    assert result is not None
    real = sum(storage.nbytes() for storage in kept.values())
    counted = tokens * (3 * found.layer_activations + found.other_activations)
    assert counted == pytest.approx(real, rel=0.06)


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe", "mixtral", "t5", "gpt2", "cohere"])
def test_other_architectures_are_counted(name, tmp_path):
    tiny_config(name).save_pretrained(tmp_path)
    found = footprint(ModelSection(path=str(tmp_path)), Path())
    assert found.layers > 0 and found.layer_activations > 0 and 0 < found.active <= found.parameters
    assert found.counted and ModelShape.from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_tiles_keep_less_of_a_layer_and_the_rest_for_one_tile_alone():
    whole, tiled = (
        footprint(ModelSection(path="builtin:tiny-llama", overrides=SHAPE, mlp_tile=tile), Path())
        for tile in ("off", 50)
    )
    assert tiled.layer_activations + tiled.tile_activations == whole.layer_activations
    # Gate, up, their product and what the gate's function keeps: at least three of the 160 numbers of two bytes; less the tile's input.
    assert tiled.tile_activations >= 3 * 160 * 2 - 64 * 2 and tiled.tile_tokens == 50
    assert tiled.tiled == 3 * 3 * 64 * 160 and tiled.parameters == whole.parameters


def test_a_token_of_a_mixture_visits_its_own_experts(tmp_path):
    tiny_config("mixtral").save_pretrained(tmp_path)
    found = footprint(ModelSection(path=str(tmp_path)), Path())
    assert found.active < found.parameters - 1000 * 32 * 2 * 0.5
