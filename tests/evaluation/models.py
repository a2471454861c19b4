"""Tiny exported models for tests: random weights, the builtin tokenizer, saved as `save_pretrained` saves."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import dstune.data

TOKENIZER = Path(dstune.data.__file__).parent / "builtin_tokenizer"
VOCABULARY = 960


def save_llama(folder: Path, context: int = 512, spread: float = 0.3) -> Path:
    """A two-layer Llama in fp32. A wide `spread` of weights keeps the likeliest tokens apart."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=spread,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    return _save(LlamaForCausalLM(config), folder)


def save_t5(folder: Path) -> Path:
    """A two-layer T5 in fp32."""
    torch.manual_seed(7)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        initializer_factor=4.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return _save(T5ForConditionalGeneration(config), folder)


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.3}
_HEADS = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.3,
    "decoder_start_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "mistral": {**_SMALL, **_HEADS, "sliding_window": 16},
    "mamba": {**_SMALL, "state_size": 8},
    "bart": _BART,
}
"""Absolute positions, a sliding window, a recurrent state, an encoder with a bidirectional mask: what padding could upset."""


def save_architecture(folder: Path, name: str) -> Path:
    """A two-layer model of an architecture of `ARCHITECTURES`."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(
        name, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=None, eos_token_id=2, **ARCHITECTURES[name]
    )
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return _save(kind.from_config(config), folder)


def _save(module, folder: Path) -> Path:
    module.save_pretrained(folder)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder / file.name)
    return folder
