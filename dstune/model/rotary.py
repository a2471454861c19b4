"""Rotary frequencies that follow the length of an example (longrope, dynamic NTK): of each example its own, as if it were alone.

transformers takes them from the longest position of a call. A short example would then turn otherwise beside a long one: in another
micro-batch, on another world, in one piece of a row and not in the next; and dynamic ones go on with what an earlier call had.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dstune.model.neftune import lengths_of_tokens

_LONGROPE, _DYNAMIC = "longrope", "dynamic"


def follow_examples(model: PreTrainedModel) -> None:
    """Put it into a causal model whose frequencies move; others are left as they are.

    Calls that say nothing of examples, or fill a cache, are transformers' own.
    """
    found = [part for part in model.modules() if _kinds(part) and not model.config.is_encoder_decoder]
    if found:
        examples = _Examples()
        model.register_forward_pre_hook(examples.look, with_kwargs=True)
        for part in found:
            part.forward = _Rotary(part, examples)


def take_piece(model: nn.Module, place: int) -> None:
    """Say which piece of its rows this worker's calls have, from 0 (`Share.place`)."""
    for part in model.modules():
        rotary = part.__dict__.get("forward")
        if isinstance(rotary, _Rotary):
            rotary.examples.place = place


class _Examples:
    """What a call says of its examples' lengths."""

    def __init__(self) -> None:
        self.place = 0
        self._lengths: torch.Tensor | None = None

    def look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        told = any(kwargs.get(name) is not None for name in ("cu_seq_lens_k", "attention_mask"))
        lengths = lengths_of_tokens(kwargs) if told and kwargs.get("use_cache") is False else None
        # Padding is of no example.
        self._lengths = None if lengths is None else lengths.nan_to_num(posinf=0.0).long()

    def lengths(self, position_ids: torch.Tensor) -> torch.Tensor | None:
        """[rows, tokens]: how long the example is that each token of `position_ids` is of; None: nobody said."""
        if self._lengths is None or position_ids.dim() != 2:
            return None
        tokens = position_ids.shape[1]
        if self._lengths.shape[1] == tokens:
            return self._lengths
        if self._lengths.numel() == position_ids.numel():  # the pieces of one row, all here
            return self._lengths.view(-1, tokens)
        return self._lengths[:, self.place * tokens : (self.place + 1) * tokens]


class _Rotary:
    """The forward pass of a rotary embedding: transformers' own for each length that makes a difference, of each token the one it wants."""

    def __init__(self, part: Any, examples: _Examples) -> None:
        self.examples = examples
        self._part, self._kinds = part, _kinds(part)
        self._plain, self._turn = part.forward, inspect.unwrap(type(part).forward)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        """What the embedding gives: [rows, tokens, size], one tensor or a tuple of them."""
        which = {} if layer_type is None else {"layer_type": layer_type}
        kind, lengths = self._kinds.get(layer_type), self.examples.lengths(position_ids)
        if kind is None or lengths is None:
            return self._plain(x, position_ids, **which)
        first = self._first(kind, layer_type)
        lengths = lengths.clamp(first, first + 1 if kind == _LONGROPE else None)
        frequencies = getattr(self._part, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq")
        before, found = frequencies.clone(), None
        for length in lengths.unique().tolist():
            moved, _ = ROPE_INIT_FUNCTIONS[kind](self._part.config, x.device, seq_len=length, **which)
            frequencies.copy_(moved)
            turned = self._turn(self._part, x, position_ids, **which)
            found = turned if found is None else _where((lengths == length)[..., None], turned, found)
        frequencies.copy_(before)
        return found

    def _first(self, kind: str, layer_type: str | None) -> int:
        """The longest example that is not long."""
        config = self._part.config
        if kind != _LONGROPE:
            return config.max_position_embeddings
        rope = config.rope_parameters
        return (rope if layer_type is None else rope[layer_type])["original_max_position_embeddings"]


def _kinds(part: Any) -> dict[str | None, str]:
    """Which frequencies of a module of transformers' own move, by the kind of layer that they are for (None: all)."""
    kinds = getattr(part, "rope_type", None) if type(part).__module__.startswith("transformers.") else None
    by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
    return {layer: kind for layer, kind in by_layer.items() if kind in (_LONGROPE, _DYNAMIC)}


def _where(here: torch.Tensor, one: Any, other: Any) -> Any:
    if isinstance(one, tuple):
        return tuple(torch.where(here, a, b) for a, b in zip(one, other, strict=True))
    return torch.where(here, one, other)
