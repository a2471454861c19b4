"""Gradients reduced from where they stand: DeepSpeed's own means of them, to the last digit where the order of a sum does not matter."""

from typing import Any
from unittest import mock

import pytest

from dstune.engine.world import World
from tests.engine import tiny
from tests.spawn import run_workers

CASES: dict[str, dict[str, Any]] = {
    "bf16": {"stage": 3},
    "fp32": {"stage": 3, "dtype": "fp32"},
    "offloaded": {"stage": 3, "offload": True},
    "many buckets": {"stage": 3, "zero": {"reduce_bucket_size": 5_000}},
    # Clipped by a norm that differs in its eighth digit, a sum in bf16 is rounded up here and down there.
    "sums in bf16": {"stage": 3, "data_types": {"grad_accum_dtype": "bf16"}, "gradient_clipping": 0.0},
}


def _both(cases: dict[str, dict[str, Any]]) -> dict[str, list[list[str]]]:
    """Losses and norms of four steps of two micro-batches each, by our reduction and by DeepSpeed's."""
    world = World.from_environment()
    world.init(60)
    found: dict[str, list[list[str]]] = {}
    for name, case in cases.items():
        ours = tiny.engine(world, **case)
        with mock.patch("dstune.engine.zero.reduce_directly"):
            theirs = tiny.engine(world, **case)
        assert theirs._zero.contiguous_gradients and not ours._zero.contiguous_gradients
        found[name] = [[repr(loss) for loss in tiny.train(one, world, range(4), 2)] for one in (ours, theirs)]
    world.close()
    return found


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2])
def test_they_are_deepspeeds_sums(world_size: int) -> None:
    for found in run_workers(_both, world_size, CASES):
        for name, (ours, theirs) in found.items():
            assert ours == theirs, name
