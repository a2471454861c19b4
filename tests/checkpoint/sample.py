"""Slices of a small pretend model, cut for any number of workers, and the control group of a single worker."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from dstune.checkpoint.commit import CommitRecord, save
from dstune.checkpoint.resolve import Checkpoint, committed
from dstune.protocols import Control, Slice

T = TypeVar("T")
SHAPES = {"embed.weight": (50, 8), "norm.weight": (7,), "scalar.bias": (1,)}


class Alone:
    """`Control` of a world of one: what is said is heard by nobody else, but must be JSON all the same."""

    rank = 0
    world_size = 1

    def barrier(self) -> None:
        pass

    def gather(self, value: T) -> list[T]:
        return [json.loads(json.dumps(value))]

    def broadcast(self, value: T) -> T:
        return json.loads(json.dumps(value))


def whole(state: str, name: str, seed: int) -> torch.Tensor:
    """The flattened parameter in a state."""
    generator = torch.Generator().manual_seed(seed * 1000 + len(state) * 10 + len(name))
    return torch.randn(SHAPES[name], generator=generator).flatten()


def slices(seed: int, rank: int = 0, world_size: int = 1) -> list[Slice]:
    """One worker's pieces, cut as ZeRO-3 cuts; a worker beyond a parameter's end has none of it."""
    pieces: list[Slice] = []
    for state in ("fp32", "exp_avg"):
        for name, shape in SHAPES.items():
            values = whole(state, name, seed)
            size = -(-values.numel() // world_size)
            piece = values[rank * size : (rank + 1) * size]
            if piece.numel():
                pieces.append(Slice(state, name, shape, rank * size, piece))
    return pieces


def commit(checkpoints: Path, step: int, control: Control | None = None, **more: Any) -> CommitRecord:
    control = control or Alone()
    pieces: Sequence[Slice] = slices(step, control.rank, control.world_size)
    return save(checkpoints, step, pieces, {"step": step}, control, {"run": "test"}, **more)


def steps(checkpoints: Path) -> list[int]:
    return [checkpoint.step for checkpoint in committed(checkpoints)]


def at(checkpoints: Path, step: int) -> Checkpoint:
    return next(checkpoint for checkpoint in committed(checkpoints) if checkpoint.step == step)
