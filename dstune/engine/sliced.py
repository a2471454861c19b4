"""Optimizers that have to know which elements of which parameters stand where in the flat tensors that they update."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.adamw import adamw as _adamw

from dstune.engine.partitions import Piece

Groups = list[dict[str, Any]]


class Sliced(torch.optim.Optimizer):
    """One that updates flat tensor by flat tensor, knowing its pieces. `place` must be called before the first step."""

    def __init__(self, params: Groups, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults | {"weight_decay": 0.0})
        self.pieces: Mapping[torch.Tensor, list[Piece]] = {}
        self.device = torch.device("cpu")

    def place(self, pieces: Mapping[torch.Tensor, list[Piece]], device: torch.device) -> None:
        """For each flat tensor its parameters, the same ones in the same order on every worker; where collectives take place."""
        self.pieces, self.device = pieces, device

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    self.update(flat, group)

    def update(self, flat: torch.Tensor, group: dict[str, Any]) -> None:
        """Update `flat`, of this group, with its gradient, which is not needed any more afterwards."""
        raise NotImplementedError


def at_once(device: torch.device) -> int:
    """Elements to handle at the same time where that takes memory: what stays in a core's cache, or keeps a GPU busy."""
    return 1 << 17 if device.type == "cpu" else 1 << 24


def adamw(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    group: Mapping[str, Any],
) -> None:
    """torch's fused AdamW with this group's settings, in place; `step` is counted up."""
    _adamw(
        [weights], [gradient], [exp_avg], [exp_avg_sq], [], [step],
        fused=True, amsgrad=False, maximize=False, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
        weight_decay=group["weight_decay"], eps=group["eps"],
    )  # fmt: skip
