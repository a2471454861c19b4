"""Adafactor on slices is torch's on whole tensors, wherever the cuts fall."""

import math
from collections.abc import Iterator, Sequence

import pytest
import torch

from dstune.engine.adafactor import Adafactor, boxes
from dstune.engine.optimizers import Settings, rule_of
from dstune.engine.partitions import Piece
from dstune.engine.world import World
from tests.spawn import run_workers

SHAPES = {"wide": (7, 5), "experts": (3, 4, 6), "tall": (9, 1), "kernel": (4, 1, 3), "elsewhere": (2, 3)}
VECTORS = {"bias": (11,), "scale": ()}
STEPS = 6


def _pieces(shapes: dict[str, tuple[int, ...]], first: int, last: int) -> Iterator[Piece]:
    """What a worker holds of parameters laid end to end whose elements `first` to `last` are its own."""
    begin = 0
    for name, shape in shapes.items():
        low, high = max(first, begin), min(last, begin + math.prod(shape))
        yield Piece(name, shape, low - begin, high - low, low - first) if low < high else Piece(name, shape)
        begin += math.prod(shape)


@pytest.mark.parametrize("most", [1, 13, 1000])
@pytest.mark.parametrize("shape", SHAPES.values())
def test_a_piece_is_its_boxes(shape: tuple[int, ...], most: int) -> None:
    count = math.prod(shape)
    whole = torch.arange(count).view(-1, *shape[-2:])
    for first in range(count):
        for last in range(first, count + 1):
            piece = Piece("", shape, first, last - first)
            elements = torch.arange(first, last)
            found = list(boxes(piece, most))
            for box in found:
                assert torch.equal(box.of(elements), whole[box.matrices, box.rows, box.columns])
                assert box.of(elements).numel() <= max(most, shape[-1])
            assert sum(box.of(elements).numel() for box in found) == last - first
            assert most < count or len(found) <= 5


def _follow() -> float:
    """The largest difference from torch's Adafactor after some steps; of two workers the first one holds a third, cut within a row."""
    world = World.from_environment()
    world.init(60)
    generator = torch.Generator().manual_seed(0)
    difference = 0.0
    for kind, shapes in {"matrix": SHAPES, "vector": VECTORS}.items():
        count = sum(math.prod(shape) for shape in shapes.values())
        first, last = ((0, count // 3), (count // 3, count))[world.rank] if world.world_size == 2 else (0, count)
        whole = [torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator)) for shape in shapes.values()]
        theirs = torch.optim.Adafactor(whole, lr=1e-2, eps=(1e-15, 1e-3), weight_decay=0.1)
        flat = _flattened(whole)[first:last].clone().requires_grad_()
        ours = _placed(flat, kind, list(_pieces(shapes, first, last)))
        for step in range(STEPS):
            gradients = [torch.randn(shape, generator=generator) * 10.0**-step for shape in shapes.values()]
            if kind == "matrix":
                gradients[0][2] = 0  # a token that no row has
            for parameter, gradient in zip(whole, gradients, strict=True):
                parameter.grad = gradient
            flat.grad = _flattened(gradients)[first:last].clone()
            theirs.step()
            ours.step()
        difference = max(difference, (flat.detach() - _flattened(whole)[first:last]).abs().max().item())
    world.close()
    return difference


def _placed(flat: torch.Tensor, kind: str, pieces: list[Piece], scaled: bool = True) -> Adafactor:
    rule = rule_of(Settings(name="adafactor", eps=1e-30, scale_parameter=scaled))
    group = {"params": [flat], "weight_decay": 0.1, "kind": kind}
    optimizer = rule.build([group], 1e-2)
    assert isinstance(optimizer, Adafactor)
    rule.prepare(optimizer, flat, group, pieces)
    optimizer.place({flat: pieces}, torch.device("cpu"))
    return optimizer


def _flattened(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def _first_steps() -> list[float]:
    """How far a vector of fours goes in the first step, whose update is the gradient's sign: with scaling and without."""
    world = World.from_environment()
    world.init(60)
    moved: list[float] = []
    for scaled in (True, False):
        flat = torch.full((3,), 4.0).requires_grad_()
        optimizer = _placed(flat, "vector", [Piece("bias", (3,), 0, 3, 0)], scaled)
        optimizer.param_groups[0]["weight_decay"] = 0.0
        flat.grad = torch.tensor([5.0, 1e-12, 0.25])
        optimizer.step()
        moved += (4.0 - flat.detach()).tolist()
    world.close()
    return moved


@pytest.mark.dist
def test_it_follows_torch_wherever_matrices_are_cut() -> None:
    for world_size in (1, 2):
        assert max(run_workers(_follow, world_size)) < 1e-7
    (moved,) = run_workers(_first_steps, 1)
    assert moved == pytest.approx([0.04] * 3 + [0.01] * 3, rel=1e-4)
