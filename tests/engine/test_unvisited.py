"""What no token of a step visits has a gradient of zero there, not the last one again: as in plain torch, step by step."""

from typing import Any

import pytest
import torch
from torch import nn

from dstune.engine.construction import construction
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.errors import ConfigError
from tests.engine import tiny
from tests.spawn import run_workers

STEPS = [[True, True], [False, False], [False, True], [True, False], [False], [True]]
"""Whether the micro-batches of each step visit the second part."""
CASES: dict[str, dict[str, Any]] = {
    "zero3": {"stage": 3},
    "zero3-offload": {"stage": 3, "offload": True},
    "zero3 in small buckets": {"stage": 3, "zero": {"reduce_bucket_size": 100}},
    "zero2": {"stage": 2},
    "zero2-offload": {"stage": 2, "offload": True},
    "zero2-offload in bf16": {"stage": 2, "offload": True, "dtype": torch.bfloat16},
    "zero1-offload in bf16": {"stage": 1, "offload": True, "dtype": torch.bfloat16},
    "zero2 overlapped": {"stage": 2, "zero": {"overlap_comm": True}},
    "zero1": {"stage": 1},
    "zero1-offload": {"stage": 1, "offload": True},
    "zero1 overlapped": {"stage": 1, "zero": {"overlap_comm": True}},
}


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(15, 15, bias=False)
        self.second = nn.Linear(15, 15, bias=False)

    def forward(self, inputs: torch.Tensor, second: bool) -> torch.Tensor:
        first = self.first(inputs)
        return first + self.second(inputs) if second else first


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(15, 15, generator=generator) / 4 for name in ("first", "second")}


def _inputs(step: int, number: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 15, generator=torch.Generator().manual_seed(100 * rank + 10 * step + number))


def _norms_by_torch(world_size: int) -> list[float]:
    module = Parts()
    for name, part in module.named_children():
        part.weight.data = _weights()[name]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    norms = []
    for step, visits in enumerate(STEPS):
        optimizer.zero_grad(set_to_none=False)
        for number, second in enumerate(visits):
            for rank in range(world_size):
                (module(_inputs(step, number, rank), second).square().sum() / world_size).backward()
        norms.append(
            float(torch.cat([each.grad.flatten() for each in module.parameters() if each.grad is not None]).norm())
        )
        optimizer.step()
    return norms


def _norms(cases: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    world = World.from_environment()
    world.init(60)
    found = {}
    for name, case in cases.items():
        extra = {key: value for key, value in case.items() if key not in ("stage", "dtype")}
        dtype = case.get("dtype", torch.float32)
        config = tiny.ds_config(case["stage"], **extra) | {"gradient_clipping": 0.0}
        with construction(config, dtype):
            module = Parts()
        engine = ZeroEngine(module, lr=0.1, ds_config=config, world=world, optimizer="sgd", momentum=0.9)
        engine.load(_fill, 0)
        found[name] = []
        for step, visits in enumerate(STEPS):
            for number, second in enumerate(visits):
                loss = engine.module(_inputs(step, number, world.rank).to(dtype), second).float().square().sum()
                engine.backward(loss, last=number == len(visits) - 1)
            found[name].append(engine.step(0.1).grad_norm)
    world.close()
    return found


def _fill(piece: Any) -> None:
    if piece.state == "fp32":
        whole = _weights()[piece.name.removesuffix(".weight")].flatten()
        piece.tensor.copy_(whole[piece.offset : piece.offset + len(piece.tensor)])
    else:
        piece.tensor.zero_()


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_are_those_of_plain_torch(world_size: int) -> None:
    expected = _norms_by_torch(world_size)
    for found in run_workers(_norms, world_size, CASES):
        for name, norms in found.items():
            rtol = 0.02 if "bf16" in name else 1e-5
            torch.testing.assert_close(
                norms, expected, rtol=rtol, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def _apart() -> str:
    """A part that only one worker's tokens visit."""
    world = World.from_environment()
    world.init(60)
    config = tiny.ds_config(2)
    with construction(config, torch.float32):
        module = Parts()
    engine = ZeroEngine(module, lr=0.1, ds_config=config, world=world, optimizer="sgd", momentum=0.9)
    engine.backward(engine.module(_inputs(0, 0, world.rank), second=world.rank == 0).square().sum(), last=True)
    try:
        engine.step(0.1)
    except ConfigError as error:
        return str(error)
    return "taken"


@pytest.mark.dist
def test_a_part_that_some_workers_alone_visit_is_refused_below_stage_3() -> None:
    first, second = run_workers(_apart, 2)
    assert "here all but none" in first and "here all but second.weight" in second
