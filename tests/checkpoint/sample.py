"""Slices of a small pretend model, cut for any number of workers, and the control group of a single worker."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from dstune.checkpoint.commit import CommitRecord, save
from dstune.checkpoint.resolve import Checkpoint, committed
from dstune.protocols import Control, Slice
from tools.rungs import pretend

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
    return pretend.whole(state, name, seed, SHAPES)


def slices(seed: int, rank: int = 0, world_size: int = 1) -> list[Slice]:
    """One worker's pieces, cut as ZeRO-3 cuts."""
    return pretend.slices(seed, rank, world_size, SHAPES, ("fp32", "exp_avg"))


def commit(checkpoints: Path, step: int, control: Control | None = None, **more: Any) -> CommitRecord:
    control = control or Alone()
    pieces: Sequence[Slice] = slices(step, control.rank, control.world_size)
    return save(checkpoints, step, pieces, {"step": step}, control, {"run": "test"}, **more)


def steps(checkpoints: Path) -> list[int]:
    return [checkpoint.step for checkpoint in committed(checkpoints)]


def at(checkpoints: Path, step: int) -> Checkpoint:
    return next(checkpoint for checkpoint in committed(checkpoints) if checkpoint.step == step)
