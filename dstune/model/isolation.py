"""Packed examples never see each other: shown for the architecture at hand, on a tiny random model of its class."""

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dstune.errors import ConfigError, Problem, first_line
from dstune.model import per_example
from dstune.model.config import auto_class
from dstune.model.failures import FAILURES
from dstune.model.remembered import Remembered
from dstune.model.restarts import restart_positions
from dstune.model.rotary import follow_examples

TOLERANCE = 1e-4
"""Largest difference that is taken for rounding, relative to the largest output, in fp32."""
_POWER = 10.0
"""How many times the tolerance a row that is one long example must differ by, or the experiment shows nothing."""
_LENGTHS = (13, 7, 11)
_SOURCE_LENGTHS = (5, 17, 9)
"""Of sequence-to-sequence models; their targets have `_LENGTHS`."""
_VOCABULARY = 128
_MOST_LAYERS = 16
_MOST_PARAMETERS = 200_000_000

# What makes a model small without changing what its layers do.
_SIZES: dict[str, int] = {
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "word_embed_proj_dim": 64,
    "embed_dim": 64,
    "out_hidden_size": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "d_ff": 96,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 32,
    "n_inner": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "rotary_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "vocab_size": _VOCABULARY,
    "vocab_size_per_layer_input": _VOCABULARY,
}
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
# Shorter than the examples, so that windows and chunks matter in the experiment.
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
_LONG = 8
"""Tokens above which the frequencies of a rotary embedding move, where they do: one of the examples is shorter."""
# At a width of 64, weights so large that what a layer sees reaches the logits: 0.02 would hide it below the tolerance.
_SPREADS = ("initializer_range", "init_std")
_SPREAD = 0.1
_FACTORS = ("short_factor", "long_factor")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
# Layer lists and periods: how many layers show every kind once.
_LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")
_PERIODS = (
    "full_attention_interval",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "attn_layer_period",
    "expert_layer_period",
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "moe_layer_freq",
    "no_rope_layer_interval",
)
_SHARED = "num_kv_shared_layers"
_OFFSETS = ("first_k_dense_replace", "attn_layer_offset", "expert_layer_offset", "moe_layer_start_index")
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}


def prove(config: PretrainedConfig, attention: str) -> None:
    """Show that `attention` keeps packed examples apart in `config`'s architecture, or raise ConfigError with the reason.

    A tiny random fp32 model of the same class, every distinct kind of layer kept: a packed row of three examples gives what each
    example alone gives with transformers' plain attention; one long example of the same tokens gives something else. Examples of
    sequence-to-sequence models have a source and a target.
    """
    reason = _disproof(config, attention)
    if reason is not None:
        raise ConfigError(
            Problem(
                "data.packing",
                f"{config.model_type} with {attention} attention: {reason}",
                "packed examples that do not see each other",
                "Set `data.packing: false`.",
            )
        )


@Remembered
def _disproof(config: PretrainedConfig, attention: str) -> str | None:
    """Why packing is refused; None where it is shown to be right."""
    kind = type(config)
    if find_model_class(kind()) is None and kind.__module__.startswith("transformers."):
        return "transformers has no model of this kind that learns to write"
    small = smallest_that_builds(config)
    if small is None:
        return "no small model of this class can be built, so nothing is shown"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        examples = examples_for(small)
        model = instance(small, "eager")
        try:
            alone = torch.cat([model(**example, use_cache=False).logits for example in examples], 1)
            joined = model(**_joined(examples), use_cache=False).logits
        except FAILURES as error:
            return f"its small model fails on a plain example ({first_line(error)})"
        try:
            # Built anew: models that settle their attention as they are built would go on with the plain one.
            asked = instance(small, attention)
            asked.load_state_dict(model.state_dict())
            packed = asked(**packed_inputs(examples), use_cache=False).logits
        except FAILURES as error:
            return f"it fails on packed rows ({first_line(error)})"
    return _verdict(alone, packed, joined)


def examples_for(config: PretrainedConfig) -> list[dict[str, torch.Tensor]]:
    """The forward arguments of each example alone, its tokens drawn."""
    lengths = [("input_ids", _LENGTHS)]
    if config.is_encoder_decoder:
        lengths = [("input_ids", _SOURCE_LENGTHS), ("decoder_input_ids", _LENGTHS)]
    size = config.get_text_config().vocab_size
    return [
        {name: torch.randint(1, size, (1, each[number])) for name, each in lengths} for number in range(len(_LENGTHS))
    ]


def _joined(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All of them as one long example."""
    return {name: torch.cat([example[name] for example in examples], 1) for name in examples[0]}


def _verdict(alone: torch.Tensor, packed: torch.Tensor, joined: torch.Tensor) -> str | None:
    scale = alone.abs().max().clamp_min(1e-12)
    starts = [sum(_LENGTHS[:number]) for number in range(len(_LENGTHS) + 1)]
    if not bool(torch.isfinite(alone).all() and torch.isfinite(packed).all()):
        return "its small model gives values that are not finite, so nothing is shown"
    if float((alone - joined).abs().max() / scale) < _POWER * TOLERANCE:
        return "its small model does not look back at all, so nothing is shown"
    for number, (start, stop) in enumerate(itertools.pairwise(starts)):
        difference = float((alone - packed)[:, start:stop].abs().max() / scale)
        if difference > TOLERANCE:
            cause = (
                "something carries over from one example to the next" if number else "it is not this model's attention"
            )
            return (
                f"example {number + 1} of {len(_LENGTHS)} in a packed row differs from itself alone by {difference:.1e} "
                f"(tolerance {TOLERANCE:.0e}): {cause}"
            )
    return None


def packed_inputs(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """A forward pass's arguments for examples laid end to end, as `dstune.batch` makes them; each `input_ids` [1, length],
    and of sequence-to-sequence models `decoder_input_ids`.
    """
    last = "decoder_input_ids" if "decoder_input_ids" in examples[0] else "input_ids"
    asking, asked = ([example[name].shape[1] for example in examples] for name in (last, "input_ids"))
    inputs: dict[str, Any] = {
        **_joined(list(examples)),
        "cu_seq_lens_q": torch.tensor([0, *asking]).cumsum(0).to(torch.int32),
        "cu_seq_lens_k": torch.tensor([0, *asked]).cumsum(0).to(torch.int32),
        "max_length_q": max(asking),
        "max_length_k": max(asked),
    }
    if last == "input_ids":
        inputs["position_ids"] = torch.cat([torch.arange(length) for length in asking])[None]
    return inputs


def find_model_class(config: PretrainedConfig) -> Any | None:
    """transformers' own class for training this architecture; None where it comes as remote code."""
    found = auto_class(config)._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, (tuple, list)) else found


def instance(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """A random fp32 model of `config`, set to evaluate."""
    per_example.register()
    own_code = not type(config).__module__.startswith("transformers.")
    # The config of foreign code only exists where the run file trusts it.
    model = auto_class(config).from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention, trust_remote_code=own_code
    )
    restart_positions(model)
    follow_examples(model)
    return model.eval()


def smallest_that_builds(config: PretrainedConfig) -> PretrainedConfig | None:
    """`config` with few layers and small sizes; else with few layers alone, where that is small enough."""
    for sizes in (True, False):
        try:
            small = shrunk(config, sizes)
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in instance(small, "eager").parameters())
        except FAILURES:
            continue
        if count <= _MOST_PARAMETERS:
            return small
    return None


def shrunk(config: PretrainedConfig, sizes: bool) -> PretrainedConfig:
    """A copy of `config` with as few layers as show every distinct kind, and (`sizes`) small widths."""
    values = config.to_dict()
    _shrink_all(values, config, sizes)
    values.pop("quantization_config", None)
    return type(config).from_dict(values)


def _shrink_all(values: dict[str, Any], config: PretrainedConfig, sizes: bool) -> None:
    """`config`'s own values and those of the configs inside it: what sees or hears is built with the rest, although no text comes by."""
    _shrink(values, sizes)
    for name in config.sub_configs:
        inner = getattr(config, name)
        if inner is not None and isinstance(values.get(name), dict):
            _shrink_all(values[name], inner, sizes)


def _shrink(values: dict[str, Any], sizes: bool) -> None:
    _shrink_depth(values)
    values.update({key: 4 for key in _WINDOWS if isinstance(values.get(key), int)})
    for rope in _ropes(values):
        if _kind(rope) == "longrope":
            rope["original_max_position_embeddings"] = values["original_max_position_embeddings"] = _LONG
        elif _kind(rope) == "dynamic":
            values["max_position_embeddings"] = _LONG
    values.update({key: _SPREAD for key in _SPREADS if isinstance(values.get(key), float)})
    values["vocab_size"] = _VOCABULARY
    if isinstance(values.get("decoder_vocab_size"), int):  # Marian's
        values["decoder_vocab_size"] = _VOCABULARY
    # Their own ids lie beyond the small vocabulary.
    values.update({key: token for key, token in _SPECIAL.items() if values.get(key) is not None})
    if sizes:
        _shrink_width(values)


def _shrink_depth(values: dict[str, Any]) -> None:
    # Encoders and decoders repeat one kind of layer; T5's `num_layers` is its encoder's.
    for name in ("encoder_layers", "decoder_layers", "num_decoder_layers"):
        if isinstance(values.get(name), int):
            values[name] = min(values[name], 2)
    key = next((key for key in _DEPTHS if key in values), None)
    if key is None:
        return
    depth = values[key]
    lists = [values[name] for name in _LAYER_LISTS if isinstance(values.get(name), list)]
    wanted = max([2, *(_prefix(kinds) for kinds in lists)])
    if values.get(_SHARED):
        # As many that read the keys of those before them: of each kind one that makes them, and one that reads.
        values[_SHARED] = min(values[_SHARED], wanted)
        wanted += values[_SHARED]
    wanted = max([wanted, *(values[name] for name in _PERIODS if isinstance(values.get(name), int))])
    wanted = max([wanted, *(values[name] + 1 for name in _OFFSETS if isinstance(values.get(name), int))])
    wanted = min(wanted, depth, _MOST_LAYERS)
    values[key] = wanted
    for name, value in values.items():
        if isinstance(value, list) and len(value) == depth:
            values[name] = value[:wanted]
        elif name == "per_layer_config" and isinstance(value, dict):
            values[name] = {index: own for index, own in value.items() if int(index) < wanted}


def _prefix(kinds: list[Any]) -> int:
    """The shortest beginning that holds every distinct kind: 4 for [a, a, a, b, a, a, a, b]."""
    seen: list[Any] = []
    last = 0
    for index, kind in enumerate(kinds):
        if kind not in seen:
            seen.append(kind)
            last = index + 1
    return last


def _shrink_width(values: dict[str, Any]) -> None:
    """Smaller sizes, of which the heads still divide the width; grouped heads stay grouped."""
    for key, size in _SIZES.items():
        value = values.get(key)
        if isinstance(value, list) and all(isinstance(one, int) for one in value):  # one for each layer
            values[key] = [min(one, size) for one in value]
        elif isinstance(value, int) and not isinstance(value, bool):
            values[key] = min(value, size)
    head_key = next((key for key in _HEADS if isinstance(values.get(key), int)), None)
    if head_key is None:
        return
    heads, grouped = values[head_key], values.get("num_key_value_heads")
    values[head_key] = min(heads, 4)
    if isinstance(grouped, int):
        values["num_key_value_heads"] = values[head_key] if grouped == heads else min(grouped, 2)
    if isinstance(values.get("head_dim"), int) and "qk_rope_head_dim" not in values:
        values["head_dim"] = 16
    _shrink_ropes(values, values[head_key])
    if isinstance(values.get("expand"), int | float) and isinstance(values.get("head_dim"), int):  # Mamba 2's heads
        values[head_key] = int(values["expand"] * values["hidden_size"]) // values["head_dim"]
    if isinstance(values.get("mamba_n_heads"), int) and isinstance(values.get("hidden_size"), int):
        inner = values.get("mamba_expand", 2) * values["hidden_size"]
        values.update(mamba_d_head=16, mamba_n_heads=inner // 16)
        if isinstance(values.get("mamba_d_ssm"), int):
            values["mamba_d_ssm"] = inner


def _shrink_ropes(values: dict[str, Any], heads: int) -> None:
    """Lists of numbers by frequency: as many as the smaller heads have."""
    size = values.get("head_dim") or values["hidden_size"] // heads if "hidden_size" in values else 0
    for rope in _ropes(values):
        if isinstance(rope.get("mrope_section"), list):
            rope["mrope_section"] = _scaled(rope["mrope_section"], size // 2)
        if "qk_rope_head_dim" in values:  # heads that keep their size
            continue
        turning = int(size * rope.get("partial_rotary_factor", 1.0)) // 2
        rope.update({key: rope[key][:turning] for key in _FACTORS if isinstance(rope.get(key), list)})


def _ropes(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The settings of rotary embeddings, whether one for all layers or one for each kind."""
    for settings in (values.get("rope_parameters"), values.get("rope_scaling")):
        if isinstance(settings, dict):
            yield settings
            yield from (one for one in settings.values() if isinstance(one, dict))


def _kind(rope: dict[str, Any]) -> str | None:
    return rope.get("rope_type") or rope.get("type")


def _scaled(sections: list[int], total: int) -> list[int]:
    """[2, 3, 3] for [16, 24, 24] and 8: the parts of a head that turn with time, height and width."""
    scaled = [section * total // sum(sections) for section in sections]
    return [total - sum(scaled[1:]), *scaled[1:]]
