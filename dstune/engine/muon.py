"""Muon where every worker holds slices: momentum by element like any other state, matrices made whole only to be orthogonalised.

So a checkpoint keeps its states as it keeps Adam's, and resumes on any world. DeepSpeed's own Muon keeps whole matrices instead.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from dstune.engine.communication import collectives
from dstune.engine.partitions import Piece
from dstune.engine.sliced import Groups, Sliced, adamw

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(Sliced):
    """Jordan et al. 2024 for groups marked `hidden`; AdamW for the others (embeddings, head, vectors).

    As `torch.optim.Muon` with Nesterov momentum and `match_rms_adamw` (Liu et al. 2025, "Muon is scalable for LLM training"):
    an update of a matrix [A, B] is scaled by 0.2 sqrt(max(A, B)), so that AdamW's learning rate and decay fit both.
    A step is a collective call.
    """

    def __init__(self, params: Groups, lr: float, momentum: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps})

    def update(self, flat: torch.Tensor, group: dict[str, Any]) -> None:
        if group["kind"] == "hidden":
            self._orthogonal(flat, group)
        else:
            state = self.state[flat]
            adamw(flat, flat.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], group)

    def _orthogonal(self, flat: torch.Tensor, group: dict[str, Any]) -> None:
        momentum = self.state[flat]["momentum_buffer"]
        momentum.lerp_(flat.grad, 1 - group["momentum"])
        update = torch.lerp(flat.grad, momentum, group["momentum"])  # type: ignore[arg-type]
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        for piece, direction in self._orthogonalised(update, self.pieces[flat]):
            scale = 0.2 * math.sqrt(max(piece.shape[-2:]))
            mine = direction[piece.offset : piece.offset + piece.length].to(flat.device)
            flat.narrow(0, piece.start, piece.length).add_(mine, alpha=-group["lr"] * scale)

    def _orthogonalised(self, update: torch.Tensor, pieces: list[Piece]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Each parameter with its whole direction, flattened, on every worker. The workers take turns to compute them.

        On 3 workers the first of three matrices is summed up on worker 0, the next on 1, the third on 2; then all three
        compute, and send. At most two matrices are in memory.
        """
        sending = collectives()
        rank, world_size = sending.get_rank(), sending.get_world_size()
        for first in range(0, len(pieces), world_size):
            turn = pieces[first : first + world_size]
            own = torch.empty(0, device=self.device)
            for owner, piece in enumerate(turn):
                whole = torch.zeros(math.prod(piece.shape), device=self.device)
                whole[piece.offset : piece.offset + piece.length] = update.narrow(0, piece.start, piece.length)
                sending.reduce(whole, dst=owner)
                if owner == rank:
                    own = whole
            if rank < len(turn):  # behind all the sums, or each worker's would wait for the one before to compute
                own = orthogonal(own.view(turn[rank].shape)).float().flatten()
            for owner, piece in enumerate(turn):
                direction = own if owner == rank else torch.empty(math.prod(piece.shape), device=self.device)
                sending.broadcast(direction, src=owner)
                yield piece, direction


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
