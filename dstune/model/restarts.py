"""Positions that restart at each example of a packed row, in the models that take no position ids of their own.

A causal model reads `position_ids`. Encoder-decoders make their positions inside: T5 and its kin as a bias that depends on the
distance alone, BART and its kin as a table that is read from the row's first place on. Hooks on their modules give them the longest
example's bias in place of the whole row's, and each example's own places. Without `cu_seq_lens_*` in the call they do nothing.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def restart_positions(model: PreTrainedModel) -> None:
    """Register the hooks on an encoder-decoder; other models are left as they are."""
    if not model.config.is_encoder_decoder:
        return
    for module in model.modules():
        if hasattr(module, "compute_bias") and "position_bias" in inspect.signature(type(module).forward).parameters:
            module.register_forward_pre_hook(_bias_of_the_longest, with_kwargs=True)
    for stack, starts in ((model.get_encoder(), "cu_seq_lens_k"), (model.get_decoder(), "cu_seq_lens_q")):
        table = getattr(stack, "embed_positions", None)
        if table is not None and "position_ids" in inspect.signature(type(table).forward).parameters:
            _Places(starts).register(stack, table)


def _bias_of_the_longest(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """T5's first layer makes the bias for all: here [1, heads, longest, longest], or one zero across to the encoder."""
    if kwargs.get("cu_seq_lens_q") is None or kwargs.get("position_bias") is not None:
        return None
    hidden = args[0]
    if module.has_relative_attention_bias:
        longest = kwargs["max_length_q" if module.is_decoder else "max_length_k"]
        bias = module.compute_bias(longest, longest, device=hidden.device)
    else:
        bias = hidden.new_zeros(1, 1, 1, 1)
    return args, {**kwargs, "position_bias": bias}


class _Places:
    """Tells a stack's table of positions where in its example each token of the row stands."""

    def __init__(self, starts: str) -> None:
        self.starts = starts
        self.places: torch.Tensor | None = None

    def register(self, stack: nn.Module, table: nn.Module) -> None:
        stack.register_forward_pre_hook(self._look, with_kwargs=True)
        table.register_forward_pre_hook(self._tell, with_kwargs=True)

    def _look(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        starts: torch.Tensor | None = kwargs.get(self.starts)
        self.places = None if starts is None else _places(starts.long())

    def _tell(
        self, table: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        return None if self.places is None else (args, {**kwargs, "position_ids": self.places})


def _places(starts: torch.Tensor) -> torch.Tensor:
    """[0, 1, 2, 0, 1] for starts [0, 3, 5]."""
    lengths = starts.diff()
    tokens = torch.arange(int(starts[-1]), device=starts.device)
    return tokens - torch.repeat_interleave(starts[:-1], lengths)
