"""Every preset that a CPU can run takes steps, and all of them the same ones (`test_swapping.py` has the states on NVMe)."""

from pathlib import Path
from typing import Any

import pytest

from dstune.config.schema import RunConfig
from dstune.engine.world import World
from dstune.engine.zero import ZeroEngine
from dstune.planning import deepspeed as planning
from tests.engine import tiny
from tests.spawn import run_workers

pytestmark = pytest.mark.dist

ON_A_CPU = ["zero1", "zero2", "zero3", "zero3-offload-optimizer", "zero3-offload-all", "zero++"]
_OVERRIDES: dict[str, dict[str, Any]] = {"zero++": {"zero_hpz_partition_size": 2, "zero_quantized_weights": False}}


def _steps() -> dict[str, list[float]]:
    world = World.from_environment()
    world.init(60)
    losses: dict[str, list[float]] = {}
    for preset in ON_A_CPU:
        overrides = _OVERRIDES.get(preset, {})
        document: dict[str, Any] = {
            "name": "x",
            "model": {"path": "builtin:tiny-llama"},
            "data": {"sources": [{"path": "builtin:instructions"}]},
            "deepspeed": {"preset": preset, "overrides": {"zero_optimization": overrides}},
        }
        config = planning.make(RunConfig.model_validate(document), Path())
        module, _ = tiny.build_kind("qwen2", False, "bf16", config)
        settings = {"betas": (0.9, 0.95), "eps": 1e-8}
        engine = ZeroEngine(module, lr=1e-3, ds_config=config, world=world, **settings)
        losses[preset] = tiny.train(engine, world, range(3))
    world.close()
    return losses


def test_each_preset_takes_the_same_steps() -> None:
    losses = run_workers(_steps, 2)[0]
    assert list(losses) == ON_A_CPU
    for preset, curve in losses.items():
        assert curve == pytest.approx(losses["zero3"], rel=1e-3), preset
        assert curve[-1] < curve[0]
