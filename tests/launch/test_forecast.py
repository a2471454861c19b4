"""What an attempt's plan settles where the run file says `auto`, and how a prediction meets what was measured."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from dstune import api
from dstune.config.load import load_run
from dstune.errors import ConfigError, FitError
from dstune.launch import comparison, machine, rundir, start
from dstune.paths import RunPaths
from dstune.planning.plan import Plan
from tests.runs.tiny import write_run

GIB = 1 << 30


def planner(folder, elsewhere=False, **sections) -> start.Planner:
    run = load_run(write_run(folder, **sections))
    prepared = api.prepare(run)
    return start.Planner(run, rundir.create(run), start.data_facts(run.config, prepared), elsewhere)


def test_a_laptop_is_planned_zero3_with_what_it_should_take(tmp_path):
    make = planner(tmp_path, train={"micro_batch_size": "auto"})
    made = make(1, 2, None, 0)
    assert (made.preset, made.micro_batch_size, made.activation_checkpointing) == ("zero3", 2, False)
    assert made.predicted is not None and 0.3 * GIB < made.predicted["peak_memory_bytes"] < GIB
    assert Plan.read(make.paths.plan(1)) == made
    assert json.loads(make.paths.ds_config(1).read_text())["zero_optimization"]["stage"] == 3
    assert [one["event"] for one in map(json.loads, make.paths.events.read_text().splitlines())] == ["planned"]
    settled = made.settle(make.run.config)
    assert settled.train.micro_batch_size == 2 and settled.model.activation_checkpointing is False


def test_gpus_that_are_named_decide_although_they_are_not_here(tmp_path):
    make = planner(tmp_path, elsewhere=True, cluster={"gpu": "rtx-4090"}, train={"micro_batch_size": "auto"})
    made = make(1, 2, None, 0)
    assert made.why and made.predicted is not None
    assert made.predicted["peak_memory_bytes"] < GIB  # no process on the host, nothing but tensors
    assert made.gpus


def test_machines_that_nobody_knows_get_zero3(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: ())
    made = planner(tmp_path, elsewhere=True)(1, 2, None, 0)
    assert made.preset == "zero3" and made.predicted is None and "cluster.gpu" in made.why
    assert not made.gpus


def test_what_fits_nowhere_is_not_started_unless_its_preset_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda: GIB)
    with pytest.raises(FitError, match=r"nearest comes zero\d, micro-batch 1, recomputing activations, which lacks"):
        planner(tmp_path / "auto", train={"micro_batch_size": "auto"})(1, 2, None, 0)
    assert planner(tmp_path / "named", deepspeed={"preset": "zero2"})(1, 2, None, 0).preset == "zero2"


def test_what_gpus_alone_can_do_is_refused_for_processors(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: ())
    with pytest.raises(ConfigError, match=r"quantized_weights: is on, and there is no GPU"):
        planner(tmp_path / "here", deepspeed={"preset": "zero++"})(1, 2, None, 0)
    assert planner(tmp_path / "there", elsewhere=True, deepspeed={"preset": "zero++"})(1, 2, None, 0).preset == "zero++"


@pytest.mark.parametrize(
    ("named", "count"),
    [(None, 8), ("2", 1), ("0,1", 2), ("", 0), ("-1", 0), ("3,-1,2", 1), (" GPU-4f2c, GPU-9d11", 2)],
)
def test_gpus_that_cuda_hides_take_no_workers(tmp_path, monkeypatch, named, count):
    """Ray counts as CUDA does; an eight-GPU machine of which a run may use one has one worker."""
    config = load_run(write_run(tmp_path)).config
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(machine, "gpus", lambda: (machine.Gpu("NVIDIA H200", 143771 << 20),) * 8)
    monkeypatch.setattr(
        start, "glob", SimpleNamespace(glob=lambda pattern: [f"/dev/nvidia{number}" for number in (*range(8), "ctl")])
    )
    assert (len(machine.usable()), start.local_gpus()) == (count, count)
    found = machine.cluster_of(config, 8, elsewhere=False, by_ray=True)
    assert (found.nodes, found.per_node, found.device.is_cpu) == (1, 8, not count)
    assert not machine.cluster_of(config, 8, elsewhere=True, by_ray=True).device.is_cpu


@pytest.mark.parametrize(
    ("gpus", "said", "elsewhere", "cores"),
    [(8, None, False, 12), (8, 3, False, 3), (0, None, False, 1), (8, None, True, 1), (100, None, False, 1)],
)
def test_gpus_share_their_machines_cores(tmp_path, monkeypatch, gpus, said, elsewhere, cores):
    """With one core of 96, updates on the host would take what twelve would in a twelfth of the time."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "gpus", lambda: (machine.Gpu("NVIDIA H200", 143771 << 20),) * gpus)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: range(96))
    make = planner(tmp_path, elsewhere=elsewhere, cluster={"cpus_per_worker": said})
    assert machine.cores_of_worker(make.run.config.cluster, elsewhere) == cores
    assert make(1, 2, None, 0).cpus_per_worker == cores


def test_rays_libraries_are_counted_where_ray_starts_the_workers(tmp_path):
    make = planner(tmp_path)
    by_ray, by_torchrun = make(1, 2, None, 0), dataclasses.replace(make, by_ray=False)(2, 2, None, 0)
    assert by_ray.planned_bytes - by_torchrun.planned_bytes == 90 << 20


@pytest.mark.parametrize(
    ("system", "wanted", "cuda"),
    [
        ("linux", ["nvidia-nccl-cu13==2.29.7; platform_system == 'Linux'"], True),
        ("darwin", ["nvidia-nccl-cu13==2.29.7; platform_system == 'Linux'"], False),
        ("linux", ["filelock"], False),
        ("linux", None, False),
    ],
)
def test_how_torch_was_built_is_seen_without_it(system, wanted, cuda, monkeypatch):
    """None: a torch that was not installed as a package."""

    def requires(name):
        if wanted is None:
            raise machine.importlib.metadata.PackageNotFoundError(name)
        return wanted

    monkeypatch.setattr(machine.importlib.metadata, "requires", requires)
    monkeypatch.setattr(machine.sys, "platform", system)
    assert machine.processor(1, 2).cuda_build is cuda


def test_predicted_stands_beside_measured(tmp_path):
    make = planner(tmp_path)
    predicted = make(3, 2, None, 10).predicted
    slow = {"step": 11, "attempt": 3, "peak_memory_bytes": 5, "step_seconds": 90.0, "tokens_per_second": 1.0}
    usual = slow | {"peak_memory_bytes": 7, "step_seconds": 2.0, "tokens_per_second": 50.0}
    before = usual | {"step": 10, "attempt": 2, "peak_memory_bytes": 99}
    lines = [before, slow, usual | {"step": 12}, usual | {"step": 13}]
    assert comparison.compared(make.paths, 3) is None
    make.paths.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = comparison.compared(make.paths, 3)
    measured = {"peak_memory_bytes": 7, "step_seconds": 2.0, "tokens_per_second": 50.0}
    assert found == {"predicted": predicted, "measured": measured}
    assert next(comparison.lines({"predicted": measured | {"peak_memory_bytes": 10}, "measured": measured})).endswith(
        "(-30%)"
    )
    assert comparison.compared(RunPaths(tmp_path / "nothing"), 1) is None
