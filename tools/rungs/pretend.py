"""A pretend model's training state, cut for any number of workers, and its checkpoints: what is needed where nothing need train."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dstune.checkpoint import commit
from dstune.checkpoint.reader import Reader
from dstune.checkpoint.resolve import Checkpoint, newest_whole
from dstune.protocols import Control, Slice
from tools.rungs.tally import expect

Shapes = Mapping[str, tuple[int, ...]]
SHAPES: Shapes = {"embed.weight": (500, 301), "norm.weight": (7,), "scalar.bias": (1,)}
STATES = ("fp32", "exp_avg", "exp_avg_sq")


def whole(state: str, name: str, seed: int, shapes: Shapes = SHAPES) -> torch.Tensor:
    """The flattened parameter in a state; other numbers for every seed."""
    generator = torch.Generator().manual_seed(seed * 1000 + len(state) * 10 + len(name))
    return torch.randn(shapes[name], generator=generator).flatten()


def slices(
    seed: int, rank: int, world_size: int, shapes: Shapes = SHAPES, states: Sequence[str] = STATES
) -> list[Slice]:
    """One worker's pieces, cut as ZeRO-3 cuts; a worker beyond a parameter's end has none of it."""
    pieces: list[Slice] = []
    for state in states:
        for name, shape in shapes.items():
            values = whole(state, name, seed, shapes)
            size = -(-values.numel() // world_size)
            piece = values[rank * size : (rank + 1) * size]
            if piece.numel():
                pieces.append(Slice(state, name, shape, rank * size, piece))
    return pieces


def save(checkpoints: Path, step: int, control: Control, run: int = 0, **more: Any) -> commit.CommitRecord:
    """Commit `step` of pretend run `run`; a collective call."""
    pieces = slices(_seed(run, step), control.rank, control.world_size)
    return commit.save(checkpoints, step, pieces, {"step": step}, control, {"run": run}, **more)


def newest_usable(checkpoints: Path, run: int = 0) -> Checkpoint:
    """The checkpoint that a resume would take, read back element by element. Raises Failed where there is none, or it is not right."""
    found, passed_over = newest_whole(checkpoints)
    expect(found is not None, f"a resume would start from step 0: {'; '.join(passed_over) or 'nothing is committed'}")
    assert found is not None
    reader = Reader(found.directory)
    for state in STATES:
        for name in SHAPES:
            same = torch.equal(reader.read(state, name), whole(state, name, _seed(run, found.step)))
            expect(same, f"{found.directory.name}: {state}/{name} is not what was saved")
    return found


def _seed(run: int, step: int) -> int:
    return run * 100 + step
