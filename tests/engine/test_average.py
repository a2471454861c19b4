"""The average of the weights: what the formula says behind every update, untouched by skipped steps, exact over a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dstune.checkpoint.commit import save
from dstune.checkpoint.reader import Reader
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.paths import step_directory
from tests.engine import tiny
from tests.spawn import run_workers

DECAY = 0.9
CASES: dict[str, dict[str, Any]] = {
    "zero3": {"stage": 3, "tied": True},
    "zero2-offload": {"stage": 2, "offload": True, "optimizer": "muon"},
    "zero1": {"stage": 1, "optimizer": "lion", "lr_scales": {"*.mlp.*": 0.1}},
}


def _states(engine: ZeroEngine) -> dict[tuple[str, str], torch.Tensor]:
    return {(piece.state, piece.name): piece.tensor.clone() for piece in engine.slices()}


def _average(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    return {name: tensor for (state, name), tensor in _states(engine).items() if state == "ema"}


def _equal(one: dict[Any, torch.Tensor], other: dict[Any, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _follow(root: Path) -> dict[str, dict[str, bool]]:
    world = World.from_environment()
    world.init(60)
    control = world.control(60)
    facts: dict[str, dict[str, bool]] = {}
    for case, settings in CASES.items():
        engine = tiny.engine(world, ema=DECAY, **settings)
        expected = {name: tensor for (state, name), tensor in _states(engine).items() if state == "fp32"}
        found = facts[case] = {"begins at the weights": _equal(_average(engine), expected)}
        for step in range(3):
            tiny.train(engine, world, range(step, step + 1))
            for (state, name), tensor in _states(engine).items():
                if state == "fp32":
                    expected[name].lerp_(tensor, 1 - DECAY)
        found["follows"] = _equal(_average(engine), expected) and bool(expected)
        loss = engine.module(input_ids=tiny.batch(0)[0][:2], use_cache=False).logits.float().mean()
        engine.backward(loss * float("inf"), last=True)
        found["skips"] = engine.step(1e-3).skipped and _equal(_average(engine), expected)
        state = {"optimizer_steps": engine.optimizer_steps}
        save(root / case, 3, engine.slices(), state, control, {})
        tiny.train(engine, world, range(3, 5))
        resumed = tiny.engine(world, ema=DECAY, **settings)
        reader = Reader(step_directory(root / case, 3))
        resumed.load(reader.fill, reader.state["optimizer_steps"])
        found["is loaded"] = _equal(_average(resumed), expected)
        tiny.train(resumed, world, range(3, 5))
        found["goes on"] = _equal(_states(resumed), _states(engine))
    world.close()
    return facts


@pytest.mark.dist
def test_the_average_follows_the_weights_and_a_resume_changes_nothing(tmp_path: Path) -> None:
    for facts in run_workers(_follow, 2, tmp_path):
        assert facts == {case: dict.fromkeys(facts[case], True) for case in CASES}
    reader, averaged = (Reader(step_directory(tmp_path / "zero3", 3), state) for state in ("fp32", "ema"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(averaged.read("fp32", name), reader.read("ema", name))
    assert not torch.equal(averaged.read("fp32", name), reader.read("fp32", name))
    assert not reader.has_weights_alone
