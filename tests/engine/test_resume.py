"""A run that goes on from a checkpoint in fresh processes: exact on the same world and stage, close on any other."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dstune.checkpoint.commit import save
from dstune.checkpoint.reader import Reader
from dstune.checkpoint.resolve import newest_whole
from dstune.engine.construction import computes_fp16
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.protocols import MODEL_STATES
from tests.engine import tiny
from tests.spawn import run_workers

pytestmark = pytest.mark.dist


def _computes_fp16() -> bool:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return computes_fp16()


HAS_FP16 = _computes_fp16()
needs_fp16 = pytest.mark.skipif(not HAS_FP16, reason="this processor has no instructions for fp16")
LR_SCALES = {"*.mlp.*": 0.1, "*norm*": 3.0, "model.layers.1.*": 0.5}
SCALE = {"initial_scale_power": 10, "loss_scale_window": 5, "hysteresis": 2}
"""Grows after five updates in a row; forgives one overflow, then halves: a state that is more than a number."""
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
    "zero3-sgd": {"stage": 3, "optimizer": "sgd"},
    "zero1-lion": {"stage": 1, "optimizer": "lion"},
    "zero3-offload-lion": {"stage": 3, "optimizer": "lion", "offload": True, "lr_scales": LR_SCALES},
    "zero1-muon": {"stage": 1, "optimizer": "muon", "lr_scales": LR_SCALES},
    "zero3-offload-muon": {"stage": 3, "optimizer": "muon", "offload": True},
    "zero2-adagrad": {"stage": 2, "optimizer": "adagrad"},
    "zero2-adafactor": {"stage": 2, "optimizer": "adafactor", "tied": True},
    "zero3-offload-adafactor": {"stage": 3, "optimizer": "adafactor", "offload": True},
    "zero2-adamw8bit": {"stage": 2, "optimizer": "adamw8bit", "tied": True},
    "zero3-offload-adamw8bit": {"stage": 3, "optimizer": "adamw8bit", "offload": True, "lr_scales": LR_SCALES},
    "zero1-lora-adafactor": {"stage": 1, "kind": "gpt2", "adapter": True, "optimizer": "adafactor"},
    "zero3-lora-muon": {"stage": 3, "kind": "qwen2", "adapter": True, "optimizer": "muon"},
    "zero2-lora-sgd": {"stage": 2, "kind": "qwen2", "adapter": True, "optimizer": "sgd"},
    "zero3-lora-adagrad": {"stage": 3, "kind": "gpt2", "adapter": True, "optimizer": "adagrad"},
    "zero1-lora-lion": {"stage": 1, "kind": "t5", "adapter": True, "optimizer": "lion"},
}
if HAS_FP16:
    CASES["zero1-fp16"] = {"stage": 1, "dtype": "fp16", "fp16": SCALE}
    CASES["zero3-offload-fp16"] = {"stage": 3, "dtype": "fp16", "offload": True, "fp16": SCALE}
CASES["zero3-plain"] = {"stage": 3, "kind": "qwen2", "zero": tiny.GATHERED}
# The last one: DeepSpeed makes hpZ's groups once in a process, and takes them for every engine after it.
CASES["zero3-hpz"] = {"stage": 3, "kind": "qwen2", "zero": tiny.GATHERED | {"zero_hpz_partition_size": 2}}
STEP = 4
LATER = range(STEP, STEP + 4)
Later = tuple[list[str], dict[str, Any]]
"""The losses of the later steps to the last digit, and the engine's state behind them."""


def _resume(engine: ZeroEngine, directory: Path) -> None:
    found, passed_over = newest_whole(directory)
    assert found is not None and found.step == STEP and not passed_over
    reader = Reader(found.directory)
    engine.load_extra_state(reader.state["engine"])
    engine.load(reader.fill, reader.state["optimizer_steps"])


def _overflow(engine: ZeroEngine, settings: dict[str, Any]) -> None:
    """Three steps of fp16 that overflow, and are skipped."""
    for _ in range(3 if "fp16" in settings else 0):
        loss = engine.module(input_ids=tiny.batch(0)[0][:2]).logits.float().mean()
        engine.backward(loss * float("inf"), last=True)
        result = engine.step(1e-3)
        assert result.skipped and result.scale_falls


def _state(engine: ZeroEngine) -> dict[str, Any]:
    return {"optimizer_steps": engine.optimizer_steps, "engine": engine.extra_state()}


def _train_later(engine: ZeroEngine, world: World) -> Later:
    losses = [repr(loss) for loss in tiny.train(engine, world, LATER)]
    return losses, _state(engine)


def uninterrupted(root: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Later]:
    world = World.from_environment()
    world.init(60)
    control = world.control(60)
    later: dict[str, Later] = {}
    for name, settings in cases.items():
        engine = tiny.engine(world, **settings)
        _overflow(engine, settings)
        tiny.train(engine, world, range(STEP))
        save(root / name, STEP, engine.slices(), _state(engine), control, {})
        later[name] = _train_later(engine, world)
    world.close()
    return later


def resumed(root: Path, cases: dict[str, dict[str, Any]], again: Path | None = None) -> dict[str, Later]:
    """What came after resuming; with `again`, what was loaded is first saved there as it stands in this world."""
    world = World.from_environment()
    world.init(60)
    control = world.control(60)
    later: dict[str, Later] = {}
    for name, settings in cases.items():
        engine = tiny.engine(world, **settings)
        _resume(engine, root / name)
        if again:
            save(again / name, STEP, engine.slices(), _state(engine), control, {})
        later[name] = _train_later(engine, world)
    world.close()
    return later


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Later, Later]]:
    root = tmp_path_factory.mktemp("checkpoints")
    first = run_workers(uninterrupted, 2, root, CASES)
    second = run_workers(resumed, 2, root, CASES)
    assert first[0] == first[1]
    return lambda name: (first[0][name], second[0][name])


@pytest.mark.parametrize("case", CASES)
def test_every_later_loss_is_equal_to_the_last_digit(runs: Callable[..., Any], case: str) -> None:
    without, resumed_later = runs(case)
    assert resumed_later == without
    assert len(set(resumed_later[0])) == len(LATER)


def test_a_machines_own_copies_of_the_weights_change_nothing(runs: Callable[..., Any]) -> None:
    assert runs("zero3-hpz") == runs("zero3-plain")


@needs_fp16
@pytest.mark.parametrize("case", ["zero1-fp16", "zero3-offload-fp16"])
def test_the_loss_scale_goes_on_where_it_was(runs: Callable[..., Any], case: str) -> None:
    """Three overflows: the first is forgiven, two halve 1024. Five updates in a row double it, the fifth of them a later one."""
    _, state = runs(case)[1]
    scaler = {"cur_scale": 512.0, "cur_iter": 11, "last_overflow_iter": 2, "cur_hysteresis": 2}
    assert state == {"optimizer_steps": 8, "engine": {"optimizer": "adamw", "loss_scaler": scaler}}


def test_worlds_and_stages_change_on_the_way(tmp_path: Path) -> None:
    """2 workers on ZeRO-3 -> 1 on ZeRO-2 -> 3 on ZeRO-1 -> 2 on ZeRO-3 with offload: the same states, the same losses."""
    common: dict[str, dict[str, Any]] = {
        "adamw": {"dtype": "fp32", "ema": 0.9},
        "lion": {"dtype": "fp32", "optimizer": "lion", "lr_scales": LR_SCALES},
        "experts": {"dtype": "fp32", "kind": "qwen3_moe", "optimizer": "muon"},
        "factored": {"dtype": "fp32", "kind": "qwen3_moe", "optimizer": "adafactor", "ema": 0.9},
        "eight-bits": {"dtype": "fp32", "optimizer": "adamw8bit", "ema": 0.9},
        "t5-lora": {"dtype": "fp32", "kind": "t5", "adapter": True, "optimizer": "muon"},
    }
    if HAS_FP16:
        common["fp16"] = {"dtype": "fp16", "fp16": SCALE}
    before = _put_over(common, {"stage": 3})
    expected = run_workers(uninterrupted, 2, tmp_path / "a", before)[0]
    original = {name: Reader(_only(tmp_path / "a" / name)) for name in common}
    changes = [("a", "b", 1, {"stage": 2}), ("b", "c", 3, {"stage": 1}), ("c", "d", 2, {"stage": 3, "offload": True})]
    for source, target, world_size, settings in changes:
        cases = _put_over(common, settings)
        later = run_workers(resumed, world_size, tmp_path / source, cases, tmp_path / target)[0]
        for name in common:
            # Blocks of 8 bits are cut anew, and so rounded, three times in all.
            rounding = 3 * 0.011 if name == "eight-bits" else 0.0
            assert_same_states(original[name], Reader(_only(tmp_path / target / name)), rounding)
            (losses, state), (losses_before, state_before) = later[name], expected[name]
            assert state == state_before, name
            ratios = torch.tensor([float(x) for x in losses]) / torch.tensor([float(x) for x in losses_before])
            assert (ratios - 1).abs().max() < {"fp16": 1e-3, "eight-bits": 2e-3}.get(name, 5e-5), name
    assert [sorted(original[name].manifest.tensors) for name in ("adamw", "lion", "experts", "factored")] == [
        ["ema", "exp_avg", "exp_avg_sq", "fp32"],
        ["exp_avg", "fp32"],
        ["exp_avg", "exp_avg_sq", "fp32", "momentum_buffer"],
        ["col_var", "ema", "fp32", "row_var", "variance"],
    ]


def _put_over(cases: dict[str, dict[str, Any]], settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: case | settings for name, case in cases.items()}


def _only(checkpoints: Path) -> Path:
    (directory,) = checkpoints.iterdir()
    return directory


def assert_same_states(one: Reader, other: Reader, rounding: float) -> None:
    """`rounding`: by how much a moment may differ, as a share of the largest."""
    assert one.state == other.state
    assert {state: dict(shapes) for state, shapes in one.manifest.tensors.items()} == other.manifest.tensors
    for state in one.manifest.tensors:
        allowed = 0.0 if state in MODEL_STATES else rounding
        for name in one.tensors(state):
            mine, theirs = one.read(state, name), other.read(state, name)
            assert (mine - theirs).abs().max() <= allowed * mine.abs().max(), (state, name)
            assert mine.abs().max() > 0, (state, name)
