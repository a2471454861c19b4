"""Tiny random models of many architectures, for tests of loading, packing and export."""

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from dstune.model import per_example
from dstune.model.config import auto_class
from dstune.model.restarts import restart_positions

_COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 1000,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 1000}
_T5 = {
    **_IDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
_SINUSOIDAL = {
    **_IDS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 0,
    "dropout": 0.0,
}
_GATED_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_ROUTED = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_EYES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_EYES = {
    "depth": 1,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
_QWEN_TEXT = {**_COMMON, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}


def _seeing(text: dict[str, Any], eyes: dict[str, Any]) -> dict[str, Any]:
    return {"text_config": text, "vision_config": eyes}


_SETTINGS = {
    "llama": _COMMON,
    "llama-small": {**_COMMON, "vocab_size": 666},
    "llama-tied": {**_COMMON, "tie_word_embeddings": True},
    "qwen2": _COMMON,
    "qwen3": {**_COMMON, "head_dim": 8},
    "mistral": {**_COMMON, "sliding_window": 8},
    "gemma2": {**_COMMON, "head_dim": 8},
    "gemma3_text": {**_COMMON, "head_dim": 8, "sliding_window": 8},
    "gpt2": {
        **_IDS,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "mixtral": {**_COMMON, "num_local_experts": 4},
    "qwen3_moe": {**_COMMON, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "switch_transformers": {
        **_T5,
        "num_experts": 4,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "router_jitter_noise": 0.0,
    },
    "bart": {
        **_IDS,
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 64,
        "dropout": 0.0,
    },
    "marian": _SINUSOIDAL,
    "pegasus": _SINUSOIDAL,
    "cohere": {**_COMMON, "num_hidden_layers": 1},
    "granite": {**_COMMON, "logits_scaling": 8.0},
    "phi": {**_COMMON, "num_key_value_heads": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": {**_COMMON, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {**_COMMON, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "falcon": {**_COMMON, "ffn_hidden_size": 48, "hidden_dropout": 0.0},
    "gpt_neo": {
        **_IDS,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
        "window_size": 8,
        "max_position_embeddings": 64,
        "embed_dropout": 0.0,
        "resid_dropout": 0.0,
    },
    "gemma4_text": {
        **_COMMON,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "per_layer_config": {1: {"head_dim": 16}},
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 1000,
    },
    "glm4_moe": {**_COMMON, **_ROUTED, "head_dim": 8},
    "dots1": {**_COMMON, **_ROUTED, "head_dim": 8},
    "phimoe": {**_COMMON, "num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "jamba": {
        **_COMMON,
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "zamba": {
        **_COMMON,
        "num_hidden_layers": 4,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "recurrent_gemma": {**_COMMON, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    "deepseek_v4": {
        **_COMMON,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "q_lora_rank": 16,
        "o_lora_rank": 8,
        "o_groups": 2,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
        "sliding_window": 8,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"],
    },
    "qwen2_moe": {**_COMMON, **_MOE},
    "qwen3_next": {**_COMMON, **_GATED_DELTA, **_MOE},
    "qwen3_5_text": {**_COMMON, **_GATED_DELTA},
    "qwen3_5": _seeing({**_COMMON, **_GATED_DELTA}, _QWEN_EYES),
    "qwen2_vl": _seeing(_QWEN_TEXT, {**_QWEN_EYES, "mlp_ratio": 1}),
    "qwen2_5_vl": _seeing(_QWEN_TEXT, _QWEN_EYES),
    "qwen3_vl": _seeing({**_QWEN_TEXT, "head_dim": 8}, _QWEN_EYES),
    "gemma3": _seeing({**_COMMON, "head_dim": 8, "sliding_window": 8}, {**_EYES, "model_type": "siglip_vision_model"})
    | {"mm_tokens_per_image": 4},
    "llava": _seeing({**_COMMON, "model_type": "llama"}, {**_EYES, "model_type": "clip_vision_model"}),
    "mistral3": _seeing({**_COMMON, "model_type": "mistral"}, {**_EYES, "model_type": "pixtral", "head_dim": 16}),
    "t5": _T5,
    "t5-gated": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "mt5": _T5,
    "umt5": _T5,
}


def tiny_config(name: str) -> PretrainedConfig:
    """The config of `_SETTINGS`; any other name is transformers' own default for that architecture."""
    return AutoConfig.for_model(name.partition("-")[0], **_SETTINGS.get(name, {}))


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model."""
    return tiny_of(tiny_config(name), seed)


def tiny_of(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random fp32 model of `config`."""
    torch.manual_seed(seed)
    return auto_class(config).from_config(config, dtype=torch.float32)


def keep_apart(module: PreTrainedModel) -> PreTrainedModel:
    """`module` as `build` leaves it for packed rows."""
    per_example.register()
    restart_positions(module)
    module.set_attn_implementation(per_example.PER_EXAMPLE)
    return module
