"""What Liger's SwiGLU and GeGLU keep for the backward pass: the gate and what it lets through, not what is made of the gate between."""

import functools
from typing import Any

import torch
from transformers import PreTrainedModel

_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def keep(model: PreTrainedModel) -> None:
    """Have the gated feed-forward layers of `model`, which has no storage, keep no more than those two and their product.

    Phi-3's, whose gate and rest are one matrix, are left alone: there Liger copies both halves, and saves nothing.
    """
    for part in model.modules():
        if all(hasattr(part, name) for name in _PROJECTIONS) and "forward" not in part.__dict__:
            part.forward = functools.partial(_forward, part)


def _forward(part: Any, hidden: torch.Tensor) -> torch.Tensor:
    return part.down_proj(_Product.apply(part.gate_proj(hidden), part.up_proj(hidden)))


class _Product(torch.autograd.Function):
    """As large as the product; has no values."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)
