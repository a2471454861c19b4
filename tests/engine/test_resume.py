"""A run that goes on from a checkpoint in fresh processes: exact on the same world and stage, close on any other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dstune.checkpoint.commit import save
from dstune.checkpoint.reader import Reader
from dstune.checkpoint.resolve import newest_whole
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from tests.engine import tiny
from tests.spawn import run_workers

pytestmark = pytest.mark.dist

CASES: dict[str, dict[str, Any]] = {
    "zero3": {"stage": 3},
    "zero2": {"stage": 2},
    "zero1": {"stage": 1},
    "zero3-offload": {"stage": 3, "offload": True},
    "zero2-offload": {"stage": 2, "offload": True},
    "zero3-tied": {"stage": 3, "tied": True},
    "zero1-tied": {"stage": 1, "tied": True},
    "zero3-fp32": {"stage": 3, "dtype": "fp32"},
    "zero1-fp32": {"stage": 1, "dtype": "fp32"},
    "zero3-tied-frozen": {"stage": 3, "tied": True, "frozen": "model.embed_tokens"},
    "zero2-frozen": {"stage": 2, "frozen": "model.layers.0"},
    "zero1-fp16": {"stage": 1, "dtype": "fp16"},
    "zero3-sgd": {"stage": 3, "optimizer": "sgd"},
    "zero1-lion": {"stage": 1, "optimizer": "lion"},
    "zero3-offload-lion": {"stage": 3, "optimizer": "lion", "offload": True},
    "zero1-muon": {"stage": 1, "optimizer": "muon"},
    "zero3-offload-muon": {"stage": 3, "optimizer": "muon", "offload": True},
    "zero2-adagrad": {"stage": 2, "optimizer": "adagrad"},
}
STEP = 4
LATER = range(STEP, STEP + 4)


def _resume(engine: ZeroEngine, directory: Path) -> None:
    found, passed_over = newest_whole(directory)
    assert found is not None and found.step == STEP and not passed_over
    reader = Reader(found.directory)
    engine.load_extra_state(reader.state["engine"])
    engine.load(reader.fill, reader.state["optimizer_steps"])


def _state(engine: ZeroEngine) -> dict[str, Any]:
    return {"optimizer_steps": engine.optimizer_steps, "engine": engine.extra_state()}


def uninterrupted(root: Path, cases: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    world = World.from_environment()
    world.init(60)
    control = world.control(60)
    losses: dict[str, list[str]] = {}
    for name, settings in cases.items():
        engine = tiny.engine(world, **settings)
        tiny.train(engine, world, range(STEP))
        save(root / name, STEP, engine.slices(), _state(engine), control, {})
        losses[name] = [repr(loss) for loss in tiny.train(engine, world, LATER)]
    world.close()
    return losses


def resumed(root: Path, cases: dict[str, dict[str, Any]], again: Path | None = None) -> dict[str, list[str]]:
    """Losses after resuming; with `again`, what was loaded is first saved there as it stands in this world."""
    world = World.from_environment()
    world.init(60)
    control = world.control(60)
    losses: dict[str, list[str]] = {}
    for name, settings in cases.items():
        engine = tiny.engine(world, **settings)
        _resume(engine, root / name)
        if again:
            save(again / name, STEP, engine.slices(), _state(engine), control, {})
        losses[name] = [repr(loss) for loss in tiny.train(engine, world, LATER)]
    world.close()
    return losses


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list[str], list[str]]]:
    root = tmp_path_factory.mktemp("checkpoints")
    first = run_workers(uninterrupted, 2, root, CASES)
    second = run_workers(resumed, 2, root, CASES)
    assert first[0] == first[1]
    return lambda name: (first[0][name], second[0][name])


@pytest.mark.parametrize("case", CASES)
def test_every_later_loss_is_equal_to_the_last_digit(runs: Callable[..., Any], case: str) -> None:
    uninterrupted_losses, resumed_losses = runs(case)
    assert resumed_losses == uninterrupted_losses
    assert len(set(resumed_losses)) == len(LATER)


def test_worlds_and_stages_change_on_the_way(tmp_path: Path) -> None:
    """2 workers on ZeRO-3 -> 1 on ZeRO-2 -> 3 on ZeRO-1 -> 2 on ZeRO-3 with offload: the same states, the same losses."""
    common = {name: {"dtype": "fp32", "optimizer": name} for name in ("adamw", "lion", "muon")}
    before = _put_over(common, {"stage": 3})
    expected = run_workers(uninterrupted, 2, tmp_path / "a", before)[0]
    original = {name: Reader(_only(tmp_path / "a" / name)) for name in common}
    changes = [("a", "b", 1, {"stage": 2}), ("b", "c", 3, {"stage": 1}), ("c", "d", 2, {"stage": 3, "offload": True})]
    for source, target, world_size, settings in changes:
        cases = _put_over(common, settings)
        losses = run_workers(resumed, world_size, tmp_path / source, cases, tmp_path / target)[0]
        for name in common:
            _assert_same_states(original[name], Reader(_only(tmp_path / target / name)))
            ratios = torch.tensor([float(x) for x in losses[name]]) / torch.tensor([float(x) for x in expected[name]])
            assert (ratios - 1).abs().max() < 5e-5, name
    assert [sorted(reader.manifest.tensors) for reader in original.values()] == [
        ["exp_avg", "exp_avg_sq", "fp32"],
        ["exp_avg", "fp32"],
        ["exp_avg", "exp_avg_sq", "fp32", "momentum_buffer"],
    ]


def _put_over(cases: dict[str, dict[str, Any]], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: case | settings for name, case in cases.items()}


def _only(checkpoints: Path) -> Path:
    (directory,) = checkpoints.iterdir()
    return directory


def _assert_same_states(one: Reader, other: Reader) -> None:
    assert {state: dict(shapes) for state, shapes in one.manifest.tensors.items()} == other.manifest.tensors
    for state in one.manifest.tensors:
        for name in one.tensors(state):
            assert torch.equal(one.read(state, name), other.read(state, name)), (state, name)
            assert one.read(state, name).abs().max() > 0, (state, name)
