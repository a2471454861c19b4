"""AdamW with moments in 8 bits (`blockwise`) for the large matrices; in a checkpoint they are numbers by element, as AdamW's own are.

The blocks begin anew in each piece of a parameter that a worker holds. So the same world and stage resume to the last digit, and on
others, where the pieces are other ones, the moments are rounded once more.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dstune.engine.blockwise import Blocks
from dstune.engine.parameters import full_shape
from dstune.engine.partitions import Piece
from dstune.engine.sliced import Groups, Sliced, adamw, at_once
from dstune.engine.states import Part

_LEAST_ELEMENTS = 4096
"""Smaller matrices keep fp32, as the paper's."""


class AdamW8bit(Sliced):
    """torch's fused AdamW; groups marked `hidden` are decoded for it, and encoded again, some elements at a time."""

    def __init__(self, params: Groups, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def update(self, flat: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[flat]
        if group["kind"] != "hidden":
            adamw(flat, flat.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], group)
            return
        for piece in self.pieces[flat]:
            weights, gradient = (one.narrow(0, piece.start, piece.length) for one in (flat.detach(), flat.grad))
            kept = [state[key][piece.name] for key in ("exp_avg", "exp_avg_sq")]
            for first, last in _spans(piece.length, flat.device):
                moments = [blocks.read(first, last) for blocks in kept]
                adamw(weights[first:last], gradient[first:last], *moments, state["step"].clone(), group)
                for blocks, moment in zip(kept, moments, strict=True):
                    blocks.write(first, moment)
        state["step"] += 1


@dataclass(frozen=True)
class Blockwise:
    """A state (`states.State`) that is kept in 8 bits."""

    is_signed: bool

    def create(self, flat: torch.Tensor, pieces: Sequence[Piece]) -> dict[str, Blocks]:
        return {piece.name: Blocks(piece.length, flat.device, self.is_signed) for piece in pieces}

    def saved(self, kept: Mapping[str, Blocks], piece: Piece) -> Part | None:
        if piece.length == 0:
            return None
        blocks = kept[piece.name]
        numbers = torch.empty(piece.length, device=blocks.codes.device)
        for first, last in _spans(piece.length, numbers.device):
            numbers[first:last] = blocks.read(first, last)
        return Part(piece.shape, piece.offset, numbers)

    @contextmanager
    def loaded(self, kept: Mapping[str, Blocks], piece: Piece) -> Iterator[Part | None]:
        part = self.saved(kept, piece)
        yield part
        if part:
            for first, last in _spans(piece.length, part.tensor.device):
                kept[piece.name].write(first, part.tensor[first:last])


def kept_in_fp32(module: torch.nn.Module) -> set[int]:
    """Embeddings, whose rows get gradients of very different sizes (the paper's section 2.3), and what is small: `id`s of parameters."""
    tables = {id(part.weight) for part in module.modules() if isinstance(part, torch.nn.Embedding)}
    return tables | {id(one) for one in module.parameters() if math.prod(full_shape(one)) < _LEAST_ELEMENTS}


def _spans(length: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """First and last elements of what is handled at once: whole blocks."""
    size = at_once(device)
    for first in range(0, length, size):
        yield first, min(first + size, length)
