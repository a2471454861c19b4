"""A tiny Llama and its engine, and a few steps on fixed random rows: what the tests of floors 3 and 4 train."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dstune.config.adapter import AdapterSection
from dstune.config.schema import ModelSection
from dstune.engine.construction import DTYPES, construction
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.model import build as model
from dstune.model import patterns, tiling
from tests.model.architectures import tiny_config

VOCABULARY = 256
ROWS = 8
LENGTH = 33


def ds_config(stage: int, **extra: Any) -> dict[str, Any]:
    zero = {"stage": stage, "reduce_bucket_size": 100_000, "stage3_prefetch_bucket_size": 50_000}
    zero |= extra.pop("zero", {})
    if extra.pop("offload", False):
        zero["offload_optimizer"] = {"device": "cpu"}
    return {"zero_optimization": zero, "gradient_clipping": 1.0} | extra


def build(tied: bool = False, dtype: str = "bf16", **sizes: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"hidden_size": 64, "intermediate_size": 172, "num_key_value_heads": 2} | sizes, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=VOCABULARY, max_position_embeddings=128, tie_word_embeddings=tied,
        initializer_range=0.05,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(config, dtype=DTYPES[dtype], attn_implementation="sdpa")


GATHERED = {"stage3_param_persistence_threshold": 0}
"""Of `zero_optimization`: gather even what is small, as all of a tiny model is."""


def build_kind(
    kind: str, adapter: bool, dtype: str, config: dict[str, Any], **model_settings: Any
) -> tuple[nn.Module, dict[str, str]]:
    """A tiny model of another architecture, random, the same on every world, with LoRA or without; and its names in checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_config(kind).save_pretrained(folder)
        section = ModelSection(
            path=folder,
            init="random",
            dtype=dtype,
            adapter=AdapterSection(rank=4) if adapter else None,
            **model_settings,
        )
        attention = "eager" if kind == "switch_transformers" else "sdpa"
        module = model.build(section, Path(folder), attention, 0, config)
        if section.mlp_tile != "off":
            tiling.tile(module, section.mlp_tile)
    return module, model.checkpoint_names(module, section)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.95), "eps": 1e-8},
    "sgd": {"momentum": 0.9},
    "lion": {"betas": (0.9, 0.99)},
    "adagrad": {"eps": 1e-10},
    "muon": {"momentum": 0.95, "betas": (0.9, 0.95), "eps": 1e-8},
    "adafactor": {"eps": 1e-30, "scale_parameter": True},
    "adamw8bit": {"betas": (0.9, 0.95), "eps": 1e-8},
}


def engine(
    world: World,
    stage: int,
    tied: bool = False,
    dtype: str = "bf16",
    optimizer: str = "adamw",
    frozen: str = "",
    kind: str = "",
    adapter: bool = False,
    sizes: dict[str, int] | None = None,
    lr_scales: dict[str, float] | None = None,
    ema: float | None = None,
    settings: dict[str, Any] | None = None,
    **extra: Any,
) -> ZeroEngine:
    """`frozen`: what the names of parameters begin with that are not trained. `kind`: another architecture, `adapter`: with LoRA,
    `settings`: further keys of its `model` section. `zero`: keys of `zero_optimization`.
    """
    config = ds_config(stage, **extra)
    names: dict[str, str] = {}
    if kind:
        module, names = build_kind(kind, adapter, dtype, config, **settings or {})
    else:
        with construction(config, DTYPES[dtype]):
            module = build(tied, dtype, **sizes or {})
    for name, parameter in module.named_parameters():
        if frozen:
            parameter.requires_grad_(not name.startswith(frozen))
    rule: dict[str, Any] = {"optimizer": optimizer, "ema": ema} | OPTIMIZERS[optimizer]
    rule["lr_scales"] = patterns.lr_scales(module, lr_scales or {}, names)
    return ZeroEngine(module, lr=1e-3, weight_decay=0.1, ds_config=config, world=world, names=names, **rule)


_SUCCESSOR = torch.randint(0, VOCABULARY, (VOCABULARY,), generator=torch.Generator().manual_seed(7))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The global batch of a step, [8, 33] ids that can be learnt, and its mask of targets: few or many in a row."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    for position in range(1, LENGTH):
        known = torch.rand(ROWS, generator=generator) < 0.8
        ids[:, position] = torch.where(known, _SUCCESSOR[ids[:, position - 1]], ids[:, position])
    lengths = torch.randint(3, LENGTH, (ROWS,), generator=generator)
    return ids, torch.arange(1, LENGTH) <= lengths[:, None]


def train(engine: ZeroEngine, world: World, steps: range, micro_batch: int = 2, lr: float = 1e-3) -> list[float]:
    """The global loss of each step; rows go round-robin over the workers (or groups that hold the model between them), short ones get
    rows of weight zero.
    """
    losses: list[float] = []
    members = max(1, engine.module.autotp_size())
    groups = world.world_size // members
    control_sum = torch.zeros(())
    for step in steps:
        ids, mask = batch(step)
        count = mask.sum()
        mine = list(range(world.rank // members, ROWS, groups))
        num_micro_batches = -(-ROWS // (groups * micro_batch))
        control_sum = torch.zeros(())
        for number in range(num_micro_batches):
            rows = mine[number * micro_batch : (number + 1) * micro_batch]
            weight = torch.tensor([1.0] * len(rows) + [0.0] * (micro_batch - len(rows)))
            rows += [0] * (micro_batch - len(rows))
            inputs = {"input_ids": ids[rows]}
            if engine.module.module.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = ids[rows]
            logits = engine.module(**inputs, use_cache=False).logits[:, :-1].float()
            each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[rows, 1:].flatten(), reduction="none")
            loss = (each.view(len(rows), -1) * mask[rows] * weight[:, None]).sum()
            engine.backward(loss * groups / count, last=number == num_micro_batches - 1)
            control_sum += loss.detach() / count
        if world.world_size > 1:
            torch.distributed.all_reduce(control_sum)
        control_sum /= members
        engine.step(lr)
        losses.append(control_sum.item())
    return losses
