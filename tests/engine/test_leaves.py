"""Mixtures of experts train under ZeRO-3 although the workers' tokens visit different experts."""

from typing import Any

import pytest
import torch
from torch import nn

from dstune.engine import leaves
from dstune.engine.construction import construction
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from tests.engine import tiny
from tests.model import architectures
from tests.spawn import run_workers

WIDTH = 8


class Routed(nn.Module):
    """Two experts in a plain list: a token with a positive first feature visits one, any other token the other."""

    def __init__(self, first: str = "experts") -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2)
        self.add_module(first, nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)]))
        self.first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [tokens, WIDTH]."""
        scores, total = self.gate(x).softmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(getattr(self, self.first)):
            visits = (x[:, 0] > 0) == bool(number)
            if visits.any():
                total = total.index_put((visits,), expert(x[visits]) * scores[visits, number, None])
        return total


class Layer(nn.Module):
    def __init__(self, name: str = "experts") -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), Routed(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, name: str = "experts") -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(name), Layer(name)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_experts_are_found_by_their_build():
    wanted = ["layers.0.mlp", "layers.1.mlp"]
    assert leaves.routed_modules(Model("experts")) == wanted
    # Under a name that says nothing: by the router's two rows.
    assert leaves.routed_modules(Model("parts")) == wanted
    assert leaves.summary(wanted) == "layers.*.mlp (2 modules)"


@pytest.mark.parametrize("kind", ["llama", "mixtral", "t5"])
def test_layers_and_fused_experts_are_no_lists_of_experts(kind):
    assert leaves.routed_modules(architectures.tiny(kind)) == []


def test_a_dictionary_of_experts_that_calls_them_is_gathered_itself():
    found = leaves.routed_modules(architectures.tiny("switch_transformers"))
    assert len(found) == 2 and all(name.endswith(".mlp.experts") for name in found)


BELOW: dict[str, dict[str, Any]] = {
    "zero2": {"stage": 2},
    "zero2 in small buckets": {"stage": 2, "zero": {"reduce_bucket_size": 40}},
    "zero2-bf16": {"stage": 2, "dtype": torch.bfloat16},
    "zero2-offload": {"stage": 2, "offload": True},
    "zero1": {"stage": 1},
    "zero1 overlapped": {"stage": 1, "zero": {"overlap_comm": True}},
    "zero1-bf16": {"stage": 1, "dtype": torch.bfloat16},
}
"""Stages that gather nothing, and sum gradients as the backward pass finishes them."""


def _halves(step: int) -> list[torch.Tensor]:
    """Tokens that visit the second expert, and as many that visit the first."""
    x = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(step))
    away = x.clone()
    x[:, 0], away[:, 0] = x[:, 0].abs() + 9, -x[:, 0].abs() - 9
    return [x, away]


def _train() -> dict[str, Any]:
    world = World.from_environment()
    world.init(60)
    found: dict[str, Any] = {}
    for stage, case in {"own": {"stage": 3, "zero": tiny.GATHERED}, **BELOW}.items():
        found[stage] = _train_own(world, **case)
    for kind in ("mixtral", "qwen3_moe", "switch_transformers"):
        engine = tiny.engine(world, 3, kind=kind, dtype="fp32", zero=tiny.GATHERED)
        found[kind] = tiny.train(engine, world, range(3)), list(engine.leaf_modules)
    world.close()
    return found


def _train_own(
    world: World, stage: int, dtype: torch.dtype = torch.float32, **extra: Any
) -> tuple[list[float], list[str]]:
    config = tiny.ds_config(stage, **extra)
    with construction(config, dtype):
        torch.manual_seed(0)
        module = Model()
    settings = {"betas": (0.9, 0.95), "eps": 1e-8}
    engine = ZeroEngine(module, lr=1e-2, ds_config=config, world=world, **settings)
    losses = torch.zeros(4)
    for step in range(4):
        halves = _halves(step)
        mine = halves[world.rank] if world.world_size == 2 else torch.cat(halves)
        loss = (engine.module(mine.to(dtype)).float() - 1).square().sum() / 24
        engine.backward(loss * world.world_size, last=True)
        engine.step(1e-2)
        losses[step] = loss.detach()
    if world.world_size == 2:
        torch.distributed.all_reduce(losses)
    return losses.tolist(), list(engine.leaf_modules)


@pytest.mark.dist
def test_two_workers_whose_tokens_visit_different_experts_learn_what_one_learns():
    (alone,), (first, second) = run_workers(_train, 1), run_workers(_train, 2, seconds=120)
    assert first == second
    for kind, (losses, gathered) in first.items():
        assert losses == pytest.approx(alone[kind][0], rel=5e-3 if "bf16" in kind else 2e-5), kind
        assert losses[-1] < losses[0], kind
        assert len(gathered) == (0 if kind in BELOW else 2), kind
    assert first["own"][1] == ["layers.0.mlp", "layers.1.mlp"]
