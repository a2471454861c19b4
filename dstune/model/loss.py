"""The loss that training and validation share: the sum of token losses over supervised tokens, in fp32."""

import inspect
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Protocol

import torch
from transformers import PretrainedConfig

from dstune.errors import ConfigError, Problem

IGNORED = -100
"""A target that is no target."""
_CHUNK_TOKENS = 512


class TokenBatch(Protocol):
    """What the loss reads of a batch (`dstune.batch.Batch`)."""

    @property
    def inputs(self) -> dict[str, Any]: ...
    @property
    def targets(self) -> torch.Tensor: ...


def summed_token_loss(module: Any, batch: TokenBatch) -> tuple[torch.Tensor, int]:
    """Sum of the cross-entropies of `batch`'s supervised tokens (fp32 scalar with its graph), and how many these are.

    `module`: the model, or the engine's callable around it. `batch.targets` [rows, length] holds at each position the
    token that it should predict, or -100. A batch without targets gives exactly 0, and gradients of 0.
    """
    model: Any = unwrapped(module)
    supervised = batch.targets != IGNORED
    inputs = forward_arguments(model, batch)
    if "logits_to_keep" in _takes(type(model)).names:
        # The model itself projects only the supervised positions, with its own scaling and soft caps: [count, vocabulary].
        logits = module(**inputs, logits_to_keep=supervised, use_cache=False).logits
    else:
        logits = module(**inputs, use_cache=False).logits
    if logits.dim() == 3:
        logits = logits[supervised]
    targets = batch.targets[supervised]
    return summed_cross_entropy(logits, targets), targets.numel()


def forward_arguments(model: Any, batch: TokenBatch) -> dict[str, Any]:
    """What `model`'s forward pass takes of `batch`'s inputs; its decoder begins each example with the model's own token."""
    inputs = taken(model, batch.inputs)
    if "decoder_input_ids" in inputs:
        inputs["decoder_input_ids"] = _started(inputs, model.config)
    return inputs


def taken(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `inputs` that `model`'s forward pass has a name for, or all where it takes any."""
    takes = _takes(type(model))
    return {key: value for key, value in inputs.items() if takes.anything or key in takes.names}


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over n of -log softmax(logits[n])[targets[n]] in fp32; `logits` [n, vocabulary] in any precision, `targets` [n].

    Works through the rows in chunks, forward and backward: nothing of the logits' size is ever made in fp32.
    """
    return _SummedCrossEntropy.apply(logits, targets)


def unwrapped(module: Any) -> torch.nn.Module:
    """The model inside an engine, or `module` itself."""
    return module.module if hasattr(module, "module") else module


def _started(inputs: dict[str, Any], config: PretrainedConfig) -> torch.Tensor:
    """`decoder_input_ids` [rows, length] with the token that this model's decoder begins with, first in each example."""
    # Not every config has the keys at all.
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(config, "bos_token_id", None) if start is None else start
    if start is None:
        raise ConfigError(
            Problem(
                "model.overrides",
                f"{config.model_type}'s config has no decoder_start_token_id",
                do="Set it: `overrides: {decoder_start_token_id: …}`.",
            )
        )
    ids = inputs["decoder_input_ids"].clone()
    starts = inputs.get("cu_seq_lens_q")
    ids[:, slice(1) if starts is None else starts[:-1].long()] = start
    return ids


class _Takes:
    """The arguments of a model's forward pass."""

    def __init__(self, forward: Any) -> None:
        parameters = inspect.signature(forward).parameters
        self.names = frozenset(parameters)
        self.anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@lru_cache(maxsize=64)
def _takes(kind: type[torch.nn.Module]) -> _Takes:
    return _Takes(kind.forward)


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        normalisers = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        for rows in _chunks(len(targets)):
            chunk = logits[rows].float()
            normalisers[rows] = chunk.logsumexp(1)
            chosen = chunk.gather(1, targets[rows, None]).squeeze(1)
            total += (normalisers[rows] - chosen).sum()
        ctx.save_for_backward(logits, targets, normalisers)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """d loss / d logits = softmax(logits) - one-hot(targets), scaled in fp32 before it is rounded."""
        logits, targets, normalisers = ctx.saved_tensors
        result = torch.empty_like(logits)
        for rows in _chunks(len(targets)):
            chunk = (logits[rows].float() - normalisers[rows, None]).exp_()
            chunk.scatter_add_(1, targets[rows, None], chunk.new_full((chunk.shape[0], 1), -1.0))
            result[rows] = chunk.mul_(gradients[0])
        return result, None


def _chunks(count: int) -> list[slice]:
    return [slice(start, min(start + _CHUNK_TOKENS, count)) for start in range(0, count, _CHUNK_TOKENS)]
