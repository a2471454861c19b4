"""Muon where every worker holds slices: momentum by element like any other state, matrices made whole only to be orthogonalised.

So a checkpoint keeps its states as it keeps Adam's, and resumes on any world. DeepSpeed's own Muon keeps whole matrices instead.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.adamw import adamw

from dstune.engine.communication import collectives

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


@dataclass(frozen=True)
class Share:
    """What this worker holds of one parameter: elements `offset` to `offset + length`, at `start` of its flat tensor."""

    shape: tuple[int, ...]
    offset: int
    start: int
    length: int


class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024 for groups marked `hidden`; AdamW for the others (embeddings, head, vectors).

    As `torch.optim.Muon` with Nesterov momentum and `match_rms_adamw` (Liu et al. 2025, "Muon is scalable for LLM training"):
    an update of a matrix [A, B] is scaled by 0.2 sqrt(max(A, B)), so that AdamW's learning rate and decay fit both.
    `place` must be called before the first step. A step is a collective call.
    """

    def __init__(
        self, params: list[dict[str, Any]], lr: float, momentum: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._shares: Mapping[torch.Tensor, list[Share]] = {}
        self._device = torch.device("cpu")

    def place(self, shares: Mapping[torch.Tensor, list[Share]], device: torch.device) -> None:
        """For each flat tensor its parameters, the same ones in the same order on every worker; where matrices are made whole."""
        self._shares, self._device = shares, device

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for flat in group["params"]:
                if flat.grad is not None:
                    (self._step_hidden if group["hidden"] else self._step_other)(flat, group)

    def _step_hidden(self, flat: torch.Tensor, group: dict[str, Any]) -> None:
        momentum = self.state[flat]["momentum_buffer"]
        momentum.lerp_(flat.grad, 1 - group["momentum"])
        update = torch.lerp(flat.grad, momentum, group["momentum"])  # type: ignore[arg-type]
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for share, direction in self._orthogonalised(update, self._shares[flat]):
            scale = 0.2 * math.sqrt(max(share.shape[-2:]))
            mine = direction[share.offset : share.offset + share.length].to(flat.device)
            flat.narrow(0, share.start, share.length).add_(mine, alpha=-group["lr"] * scale)

    def _step_other(self, flat: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[flat]
        adamw(
            [flat], [flat.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            fused=True, amsgrad=False, maximize=False, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
            weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip

    def _orthogonalised(self, update: torch.Tensor, shares: list[Share]) -> Iterator[tuple[Share, torch.Tensor]]:
        """Each parameter with its whole direction, flattened, on every worker. The workers take turns to compute them.

        On 3 workers the first of three matrices is summed up on worker 0, the next on 1, the third on 2; then all three
        compute, and send. At most two matrices are in memory.
        """
        sending = collectives()
        rank, world_size = sending.get_rank(), sending.get_world_size()
        for first in range(0, len(shares), world_size):
            turn = shares[first : first + world_size]
            own = torch.empty(0, device=self._device)
            for owner, share in enumerate(turn):
                whole = torch.zeros(math.prod(share.shape), device=self._device)
                whole[share.offset : share.offset + share.length] = update.narrow(0, share.start, share.length)
                sending.reduce(whole, dst=owner)
                if owner == rank:
                    own = orthogonal(whole.view(share.shape)).float().flatten()
            for owner, share in enumerate(turn):
                direction = own if owner == rank else torch.empty(math.prod(share.shape), device=self._device)
                sending.broadcast(direction, src=owner)
                yield share, direction


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix, nearly, of each [..., A, B]: five steps of Newton and Schulz's iteration in bf16."""
    first, second, third = _COEFFICIENTS
    x = matrix.bfloat16().reshape(-1, *matrix.shape[-2:])
    is_tall = x.size(-2) > x.size(-1)
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
    return (x.mT if is_tall else x).reshape(matrix.shape)
