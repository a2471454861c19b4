"""The loss does not depend on the split; a non-finite gradient changes nothing anywhere; settings that cannot work are refused."""

import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from dstune.checkpoint.layout import SliceEntry, tile
from dstune.engine import communication
from dstune.engine.construction import DTYPES, complete, construction, stage_of
from dstune.engine.world import World
from dstune.errors import ConfigError
from tests.engine import tiny
from tests.spawn import run_workers

NVME = {"device": "nvme", "nvme_path": "/nvme"}
SPLITS = [(1, 8), (1, 4), (2, 4), (2, 2), (3, 2)]
"""Workers and micro-batch, of a global batch of 8; at 3 workers padded by rows of weight zero."""


def _curves(cases: list[dict[str, Any]], micro_batches: list[int]) -> list[list[float]]:
    world = World.from_environment()
    world.init(60)
    curves = [
        tiny.train(tiny.engine(world, **case), world, range(20), micro_batch)
        for case in cases
        for micro_batch in micro_batches
    ]
    world.close()
    return curves


@pytest.mark.dist
def test_the_loss_curve_does_not_depend_on_the_split() -> None:
    """20 steps. Measured when this was written: fp32 2e-7, bf16 1.6e-4 relative."""
    cases = [{"stage": stage, "dtype": dtype} for dtype in ("fp32", "bf16") for stage in (3, 1)]
    cases.append({"stage": 2, "dtype": "bf16"})
    curves: list[list[list[float]]] = [[] for _ in cases]
    for world_size in (1, 2, 3):
        micro_batches = [micro_batch for size, micro_batch in SPLITS if size == world_size]
        results = iter(run_workers(_curves, world_size, cases, micro_batches)[0])
        for curve in curves:
            curve += [next(results) for _ in micro_batches]
    for case, curve in zip(cases, curves, strict=True):
        reference = torch.tensor(curve[0])
        drift = (torch.tensor(curve) / reference - 1).abs().max()
        assert 0 < drift < (1e-5 if case["dtype"] == "fp32" else 1e-3), case
        assert reference[-1] < reference[0] - 0.5


def _precisions() -> dict[tuple[int, str], set[torch.dtype]]:
    """What parameters are made of for each stage and precision, on a processor that cannot compute fp16, as most cannot."""
    world = World()
    world.init(60)
    found = {}
    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", lambda accelerator: False):
        for stage in (1, 3):
            for name in ("fp32", "bf16"):
                with construction(tiny.ds_config(stage), DTYPES[name]):
                    weight: Any = torch.nn.Linear(4, 4).weight
                found[stage, name] = {weight.dtype, getattr(weight, "ds_tensor", weight).dtype}
    world.close()
    return found


@pytest.mark.dist
def test_weights_have_the_precision_that_was_asked_for_whatever_the_processor_computes() -> None:
    """DeepSpeed made bf16 of fp32, without a word, wherever fp16 was missing."""
    (found,) = run_workers(_precisions, 1)
    assert found == {key: {DTYPES[key[1]]} for key in found} and len(found) == 4


POISONED: dict[str, dict[str, Any]] = {
    "zero3": {"stage": 3},
    "zero2": {"stage": 2},
    "zero1": {"stage": 1},
    "zero3-fp32": {"stage": 3, "dtype": "fp32"},
    "zero1-fp32": {"stage": 1, "dtype": "fp32"},
    "zero3-offload": {"stage": 3, "offload": True},
    "zero2-offload": {"stage": 2, "offload": True},
    "zero1-offload": {"stage": 1, "offload": True},
}


def _poisoned(cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A step whose loss is not finite on worker 1 alone, between ordinary ones; and the same run without it."""
    world = World.from_environment()
    world.init(60)
    facts: dict[str, dict[str, Any]] = {}
    ids, _ = tiny.batch(0)
    for name, case in cases.items():
        engine = tiny.engine(world, **case)
        tiny.train(engine, world, range(2))
        before = [piece.tensor.clone() for piece in engine.slices()]
        for last in (False, True):
            loss = engine.module(input_ids=ids[:2]).logits.float().mean()
            engine.backward(loss * (float("nan") if world.rank == 1 and last else 1.0), last=last)
        result = engine.step(1e-3)
        pairs = zip(before, engine.slices(), strict=True)
        facts[name] = {
            "result": result,
            "unchanged": all(torch.equal(old, piece.tensor) for old, piece in pairs),
            "optimizer_steps": engine.optimizer_steps,
            "later": [repr(loss) for loss in tiny.train(engine, world, range(2, 5))],
            "undisturbed": [repr(loss) for loss in tiny.train(tiny.engine(world, **case), world, range(5))[2:]],
        }
    world.close()
    return facts


@pytest.fixture(scope="module")
def poisoned() -> list[dict[str, dict[str, Any]]]:
    return run_workers(_poisoned, 2, POISONED)


@pytest.mark.dist
@pytest.mark.parametrize("case", POISONED)
def test_one_workers_nan_skips_the_update_everywhere_and_leaves_no_trace(
    poisoned: list[dict[str, dict[str, Any]]], case: str
) -> None:
    for worker in poisoned:
        facts = worker[case]
        assert facts["result"].skipped and facts["result"].grad_norm == float("inf")
        assert facts["unchanged"] and facts["optimizer_steps"] == 2
        assert facts["later"] == facts["undisturbed"]


def _facts(folder: Path) -> tuple[dict[int, dict[str, Any]], dict[str, float]]:
    world = World.from_environment()
    world.init(60)
    facts: dict[int, dict[str, Any]] = {}
    ids, _ = tiny.batch(0)
    for stage in (1, 2, 3):
        engine = tiny.engine(world, stage, dtype="fp32")
        pieces = [(part.state, part.name, part.shape, part.offset, part.tensor.numel()) for part in engine.slices()]
        decays = [(group["weight_decay"], group["lr"]) for group in engine._optimizer.param_groups]
        counted, started = engine.communication_seconds(), time.perf_counter()
        engine.backward(engine.module(input_ids=ids).logits.logsumexp(-1).sum(), last=True)
        norm = engine.step(0.25).grad_norm
        stood = (engine.communication_seconds() - counted, time.perf_counter() - started)
        lrs = {group["lr"] for group in engine._optimizer.param_groups}
        with pytest.raises(AssertionError, match="fresh"):
            engine.load(lambda piece: None, 0)
        facts[stage] = {"pieces": pieces, "decays": decays, "norm": norm, "lrs": lrs, "extra": engine.extra_state()}
        streams = [getattr(*place) for place in communication.streams(engine._zero, stage)]
        facts[stage] |= {"stood": stood, "streams": streams}
    # The class for ZeRO-1 in bf16 has other attributes.
    facts[1]["streams"] += [getattr(*place) for place in communication.streams(tiny.engine(world, 1)._zero, 1)]
    held = {name: _held_back(world, folder / name, behind=name == "behind") for name in ("blocking", "behind")}
    world.close()
    return facts, held


def _held_back(world: World, file: Path, behind: bool) -> float:
    """What is counted of a sum for which worker 0 waits from moment 0 on, and to which worker 1 comes at moment 100.

    Their moments are in `file`, and worker 1 moves them as soon as worker 0 has looked.
    """
    store, clock, number = dist.FileStore(str(file), 2), communication.timed(world.device), torch.ones(1)
    store.set_timeout(timedelta(seconds=60))
    collectives, before = communication.collectives(), clock.seconds()

    def now() -> float:
        moment = float(store.add("moment", 0))
        store.set("looked", "")
        return moment

    sum_up = partial(collectives.all_reduce, number)
    if behind and world.rank == 0:
        sum_up = sum_up(async_op=True).wait
    if world.rank == 1:
        store.wait(["looked"])
        store.add("moment", 100)
    with mock.patch.object(communication, "time", SimpleNamespace(perf_counter=now)):
        sum_up()
    assert number.item() == 2
    return clock.seconds() - before


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_workers(_facts, 2, tmp_path_factory.mktemp("held"))


@pytest.fixture(scope="module")
def facts(both: list[Any]) -> list[dict[int, dict[str, Any]]]:
    return [facts for facts, _ in both]


@pytest.mark.dist
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_slices_are_disjoint_and_whole_and_decay_is_on_matrices(
    facts: list[dict[int, dict[str, Any]]], stage: int
) -> None:
    pieces = [SliceEntry(*piece) for worker in facts for piece in worker[stage]["pieces"]]
    shapes, problems = tile(pieces)
    assert problems == []
    model = {name: tuple(parameter.shape) for name, parameter in tiny.build(dtype="fp32").named_parameters()}
    assert shapes == {"fp32": model, "exp_avg": model, "exp_avg_sq": model}
    for worker in facts:
        seen = worker[stage]
        assert seen["decays"] == [(0.1, 1e-3), (0.0, 1e-3)]
        assert seen["lrs"] == {0.25} and seen["norm"] == facts[0][stage]["norm"] > 1
        assert seen["extra"] == {"optimizer": "adamw"}


@pytest.mark.dist
def test_standing_still_for_another_worker_is_counted(both: list[Any]) -> None:
    for facts, _ in both:
        for stage in (1, 2, 3):
            counted, elapsed = facts[stage]["stood"]
            assert 0 < counted < elapsed
            assert set(facts[stage]["streams"]) == {None}, "a CPU has no streams"
    assert [held for _, held in both] == [{"blocking": 100.0, "behind": 100.0}, {"blocking": 0.0, "behind": 0.0}]


def test_dstunes_own_settings_are_filled_in() -> None:
    config = complete({"zero_optimization": {"stage": 2}, "data_types": {"grad_accum_dtype": "bf16"}}, torch.bfloat16)
    assert config["bf16"] == {"enabled": True, "immediate_grad_update": True} and config["fp16"] == {"enabled": False}
    assert config["gradient_accumulation_steps"] == 1
    assert config["data_types"] == {"grad_accum_dtype": "bf16"}
    assert config["communication_data_type"] == "fp32"
    assert not config["timers"]["throughput"]["enabled"], "it would wait for the GPU in every forward pass"
    assert complete(config, torch.bfloat16) == config


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"optimizer": {"type": "Adam"}}, "deepspeed: optimizer"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: 4; expected 1"),
        ({"bf16": {"enabled": False}}, r"bf16\.enabled"),
        ({"zero_optimization": {"stage": 3}, "prescale_gradients": True}, "prescale_gradients: is on; expected off"),
        (
            {"zero_optimization": {"stage": 3, "stage3_module_granularity_threshold": 9}},
            "granularity_threshold: is set",
        ),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size"),
        ({"zero_optimization": {"stage": 3}, "tensor_parallel": {"autotp_size": 2}}, "expected 1 or 2"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "disk"}}}, r"offload_optimizer\.device"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, r"offload_param\.nvme_path"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "below stage 3"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "an absolute path"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": NVME | {"pipeline_write": True}}}, "pipeline_write"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}}, "super_offload"),
    ],
)
def test_settings_that_cannot_work_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        complete(config, torch.bfloat16)


def test_copies_are_left_out_where_the_workers_do_not_divide_into_their_groups(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for workers, size in [(8, 8), (16, 8), (12, 1), (4, 1), (9, 1)]:
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda count=workers: count)
        config = complete({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, torch.bfloat16)
        assert config["zero_optimization"]["zero_hpz_partition_size"] == size


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs have the kernels")
def test_what_wants_a_gpu_is_refused_without_one() -> None:
    zero = {"stage": 3, "zero_quantized_weights": True, "zero_quantized_gradients": True}
    with pytest.raises(
        ConfigError, match=r"(?s)gradients: True; expected off.*reads them as fp16.*weights: is on, and there is no GPU"
    ):
        complete({"zero_optimization": zero}, torch.bfloat16)


@pytest.mark.parametrize("stage", [0, 4, "3", None])
def test_other_stages_are_refused(stage: Any) -> None:
    with pytest.raises(ConfigError, match="stage"):
        stage_of({"zero_optimization": {"stage": stage}})
