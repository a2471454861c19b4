"""Every DeepSpeed preset: policy only, in keys that the installed DeepSpeed knows, and the stage that its name says.

Those that cannot be trusted on any device, or shown to work on a CPU, are refused, with what to take instead;
`tests/engine/test_preset_steps.py` trains the others.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from dstune.config.presets import preset_names
from dstune.config.schema import RunConfig
from dstune.errors import ConfigError, Problem
from dstune.paths import shared_files
from dstune.planning import deepspeed as planning
from dstune.planning import zero_settings
from dstune.planning.reachable import STREAMED, fitted, left_out, small_buffers, uneven_pieces

NAMES = preset_names()
SECTIONS: dict[str, Any] = {
    "offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "offload_param": DeepSpeedZeroOffloadParamConfig,
    "leaf_module": DeepSpeedZeroLeafModuleConfig,
}
REFUSED = {
    "zero3-superoffload": r"super_offload: True; expected False\s+It wants CUDA, and .* process: no checkpoint could be made",
    "zero3-zenflow": r"zenflow: .*; expected off\s+It updates 16-bit weights .*, with `checkpoint\.weights_only` neither",
}
"""And why."""

_WITH_A_DISK = {"zero_optimization": {"offload_optimizer": {"nvme_path": "/local_nvme"}}}


def config(preset: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "x",
            "model": {"path": "builtin:tiny-llama"},
            "data": {"sources": [{"path": "builtin:instructions"}]},
            "deepspeed": {"preset": preset, "overrides": _WITH_A_DISK if preset == "zero3-nvme" else {}},
        }
    )


def values(node: Any) -> Iterator[Any]:
    for item in node.values() if isinstance(node, dict) else node:
        yield item
        if isinstance(item, dict | list):
            yield from values(item)


def test_the_presets_are_all_there() -> None:
    offloading = {"zero3-offload-optimizer", "zero3-offload-all", "zero3-nvme", "zero3-zenflow", "zero3-superoffload"}
    assert set(NAMES) == {"zero1", "zero2", "zero3", "zero++"} | offloading


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_policy_only(name: str) -> None:
    preset = json.loads((shared_files("ds_configs") / f"{name}.json").read_text())
    assert set(preset) == {"zero_optimization"}
    assert "auto" not in list(values(preset))
    assert preset["zero_optimization"]["stage"] == (3 if name == "zero++" else int(name[4]))
    assert ("offload_optimizer" in preset["zero_optimization"]) == name.startswith("zero3-")
    assert ("offload_param" in preset["zero_optimization"]) == name.endswith("-all")


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_knows_every_key(name: str) -> None:
    settings = planning.load_preset(name, shared_files("ds_configs"))["zero_optimization"]
    known = DeepSpeedZeroConfig.model_fields
    assert settings.keys() <= {*known, *(field.alias for field in known.values())}
    made = DeepSpeedZeroConfig(**settings)
    assert made.stage == settings["stage"]
    if "stage3_prefetch_bucket_size" in settings:
        assert made.prefetch_bucket_size == settings["stage3_prefetch_bucket_size"]


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(REFUSED)))
def test_a_preset_makes_a_whole_config(name: str) -> None:
    made = planning.make(config(name), shared_files("ds_configs"))
    assert made["zero_optimization"]["stage"] == (3 if name == "zero++" else int(name[4]))
    assert made["bf16"]["enabled"]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("weights_only", [False, True])
def test_what_is_refused_says_why_and_names_what_to_take_instead(name: str, weights_only: bool) -> None:
    run = config(name)
    checkpoint = run.checkpoint.model_copy(update={"weights_only": weights_only})
    with pytest.raises(ConfigError, match=rf"{REFUSED[name]}\. The preset zero3-offload-optimizer"):
        planning.make(run.model_copy(update={"checkpoint": checkpoint}), shared_files("ds_configs"))


def test_compiling_by_deepspeed_is_refused_rather_than_ignored() -> None:
    section = config("zero3").deepspeed.model_copy(update={"overrides": {"compile": {"deepcompile": True}}})
    with pytest.raises(
        ConfigError, match=r"compile: is set[\s\S]*`model.compile: layers`[\s\S]*DeepCompile.*in 16 bits"
    ):
        planning.make(config("zero3").model_copy(update={"deepspeed": section}), shared_files("ds_configs"))


def refused(zero: dict[str, Any], preset: str = "zero3") -> tuple[Problem, ...]:
    """What is said of these overrides of `zero_optimization`."""
    made = config(preset)
    section = made.deepspeed.model_copy(update={"overrides": {"zero_optimization": zero}})
    with pytest.raises(ConfigError) as caught:
        planning.make(made.model_copy(update={"deepspeed": section}), shared_files("ds_configs"))
    return caught.value.problems


def test_a_misspelled_key_of_zero_is_found_before_a_worker_meets_it() -> None:
    (problem,) = refused({"reduce_bucket_sise": 5, "max_live_parameters": 9})
    assert problem.where == "deepspeed.overrides.zero_optimization.reduce_bucket_sise"
    assert problem.do == "did you mean 'reduce_bucket_size'?"
    (problem,) = refused({"offload_optimizer": {"device": "cpu", "pin_memry": True}})
    assert problem.where.endswith("offload_optimizer.pin_memry") and "'pin_memory'" in problem.do


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("reduce_bucket_size", "many", "a whole number, 1 or more"),
        ("reduce_bucket_size", 0, "a whole number, 1 or more"),
        ("reduce_bucket_size", 5.5, "a whole number, 1 or more"),
        ("reduce_bucket_size", float("inf"), "a whole number, 1 or more"),
        ("stage3_param_persistence_threshold", -1, "a whole number, 0 or more"),
        ("max_live_parameters", True, "a whole number, 0 or more"),
        ("overlap_comm", "false", "true, false or null"),
        ("stage", "3", "1, 2 or 3"),
        ("offload_param", "cpu", "a section of keys, or null"),
        ("cpu_offload", True, "`offload_optimizer: {device: cpu}` in its place"),
        ("compute_grad_norm", False, "true: dstune logs the norm of every step"),
    ],
)
def test_a_value_that_deepspeed_does_not_take_is_found_before_a_worker_meets_it(
    key: str, value: Any, expected: str
) -> None:
    (problem,) = refused({key: value})
    assert problem.where == f"deepspeed.overrides.zero_optimization.{key}"
    assert (problem.came, problem.expected) == (f"is {value!r}", expected)


def test_parameters_are_offloaded_where_they_are_partitioned() -> None:
    (problem,) = refused({"offload_param": {"device": "cpu"}}, "zero2")
    assert problem.came == "'cpu' below stage 3"


def test_all_that_is_wrong_is_said_at_once_and_where_it_stands(tmp_path: Path) -> None:
    preset = tmp_path / "mine.json"
    preset.write_text(json.dumps({"zero_optimization": {"stage": 3, "reduce_bucket_size": -1}, "steps": 1}))
    inner = {"device": "disk", "buffer_count": "4", "ratio": 2}
    found = refused({"offload_optimizer": inner, "leaf_module": {"names": [1]}}, str(preset))
    own = f"deepspeed ({preset})"
    below = "deepspeed.overrides.zero_optimization."
    offload = below + "offload_optimizer."
    assert [one.where for one in found] == [
        own, f"{own}: zero_optimization.reduce_bucket_size",
        offload + "device", offload + "buffer_count", offload + "ratio", below + "leaf_module.names",
    ]  # fmt: skip


def test_the_known_keys_of_zero_are_deepspeeds() -> None:
    no_more = {"mics_shard_size"}  # of earlier versions, and refused with a reason
    assert zero_settings.KEYS.keys() - no_more == aliases(DeepSpeedZeroConfig) - {"legacy_stage1"}, (
        "which can only be off"
    )
    for name, model in SECTIONS.items():
        assert zero_settings.INNER[name].keys() == aliases(model)


def test_nothing_is_let_pass_that_deepspeed_refuses() -> None:
    tried: list[Any] = [-1, 0, 1, 7, 0.5, 1.5, 5e8, "many", "cpu", True, False, None, ["a"], [1], {}, {"device": "cpu"}]
    for path, model, known in [
        ("", DeepSpeedZeroConfig, zero_settings.KEYS),
        *((name, model, zero_settings.INNER[name]) for name, model in SECTIONS.items()),
    ]:
        for key, value in itertools.product(aliases(model) & known.keys(), tried):
            section: dict[str, Any] = {key: value}
            if list(zero_settings.wrong({path: section} if path else section)) or key == "zenflow":
                continue
            model(**section)


def aliases(model: Any) -> set[str]:
    """The keys of a section, as DeepSpeed's own description of it has them."""
    return {field.alias or name for name, field in model.model_fields.items()}


@pytest.mark.parametrize("section", [2, [2], {"autotp_size": "two"}, {"autotp_size": True}])
def test_a_size_of_autotp_that_is_none_is_refused(section: Any) -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel\.autotp_size: is .*; expected a whole number"):
        planning.policy_of("zero2", {"tensor_parallel": section}, shared_files("ds_configs"))


@pytest.mark.parametrize("preset", ["auto", "zero1", "zero2", "zero3", "zero3-offload-all", "zero++"])
def test_autotp_goes_with_the_stages_that_leave_layers_whole(preset: str) -> None:
    section = config("zero3").deepspeed
    section = section.model_copy(update={"preset": preset, "overrides": {"tensor_parallel": {"autotp_size": 2}}})
    run = config("zero3").model_copy(update={"deepspeed": section})
    with pytest.raises(ConfigError, match=r"tensor_parallel.autotp_size: 2, with cluster\.tensor_parallel: 1"):
        planning.make(run, shared_files("ds_configs"))  # the rows would be shared out to each worker
    run = run.model_copy(update={"cluster": run.cluster.model_copy(update={"tensor_parallel": 2})})
    if preset in ("auto", "zero1", "zero2"):
        made = planning.make(run, shared_files("ds_configs"))
        assert made["tensor_parallel"] == {"autotp_size": 2} and made["zero_optimization"]["stage"] in (1, 2)
    else:
        with pytest.raises(ConfigError, match=r"stage: 3, with cluster\.tensor_parallel: 2; expected 1 or 2"):
            planning.make(run, shared_files("ds_configs"))


def test_what_no_checkpoint_could_be_made_of_is_refused_before_anything_starts() -> None:
    zero = {"mics_shard_size": 2, "zenflow": {"topk_ratio": 0.1}}
    with pytest.raises(ConfigError, match=r"zenflow(.|\n)*mics_shard_size: 2; expected off"):
        _made("zero3", zero)


def _made(preset: str, zero: dict[str, Any]) -> dict[str, Any]:
    section = config(preset).deepspeed.model_copy(update={"overrides": {"zero_optimization": zero}})
    made = planning.make(config(preset).model_copy(update={"deepspeed": section}), shared_files("ds_configs"))
    return made["zero_optimization"]


def test_weights_on_nvme_are_let_go_of_at_once() -> None:
    """DeepSpeed would gather ahead, and keep, more of them than it has buffers for."""
    zero = _made("zero3", {"offload_param": {"device": "nvme", "nvme_path": "/disk"}, "max_reuse_distance": 5})
    assert {key: zero[key] for key in STREAMED} == dict.fromkeys(STREAMED, 0) and "max_reuse_distance" not in zero
    assert DeepSpeedZeroConfig(**zero).max_reuse_distance == 0
    for beside in ({"zero_hpz_partition_size": 8}, {"zero_quantized_weights": True}, {"stage": 2}):
        with pytest.raises(ConfigError, match=r"on with weights on NVMe|'nvme' below stage 3"):
            _made("zero3", {"offload_param": {"device": "nvme", "nvme_path": "/disk"}, **beside})
    with pytest.raises(ConfigError, match=r"offload_param\.nvme_path=/local_nvme: a directory"):
        _made("zero3", {"offload_param": {"device": "nvme"}})


def test_buffers_that_nothing_goes_into_are_refused() -> None:
    for name in ("offload_optimizer", "offload_param"):
        (problem,) = refused({name: {"device": "nvme", "nvme_path": "/disk", "buffer_count": 0}})
        assert problem.where.endswith(f"{name}.buffer_count") and problem.expected == "a whole number, 1 or more"
    (problem,) = refused({"offload_param": {"device": "nvme", "nvme_path": "/disk", "buffer_size": 0}})
    assert problem.where.endswith("buffer_size")
    with pytest.raises(ConfigError, match=r"offload_optimizer\.buffer_count: 3; expected 4 or more"):
        _made("zero3-nvme", {"offload_optimizer": {"nvme_path": "/disk", "buffer_count": 3}})


def test_a_piece_of_the_largest_weight_has_to_go_into_a_buffer() -> None:
    def said(size: int, workers: int, **more: Any) -> list[Problem]:
        weights = {"device": "nvme", "nvme_path": "/disk", "buffer_size": size}
        return small_buffers({"zero_optimization": {"stage": 3, "offload_param": weights}, **more}, 10**7, workers, 2)

    (problem,) = said(10**6, 4)
    assert problem.came.startswith("1,000,000, and") and problem.expected == "2,500,000 or more"
    assert not said(2_500_000, 4) and not said(10**6, 10)
    assert not said(1, 20)  # pieces below a mebibyte stay in memory
    assert not said(10**6, 4, aio={"block_size": 8 << 20})


def test_pieces_of_weights_go_into_8_bits_by_eights() -> None:
    sizes, on = [4096 * 4096, 4096, 128], {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}
    (problem,) = uneven_pieces(on, sizes, 32)
    assert problem.came == "is on, and a worker's piece of 128 elements has 4 (32 workers)"
    assert not uneven_pieces(on, sizes, 16) and not uneven_pieces({}, sizes, 32)


def test_copies_within_machines_are_planned_for_where_there_will_be_any() -> None:
    policy = planning.load_preset("zero++", shared_files("ds_configs"))
    for workers, copies in ((8, 8), (16, 8), (12, 1), (4, 1)):
        assert fitted(policy, workers)["zero_optimization"]["zero_hpz_partition_size"] == copies
        assert bool(left_out(policy, workers)) == (copies == 1)


def test_nvme_wants_to_be_told_which_disk() -> None:
    told = config("zero3-nvme")
    offload = planning.make(told, shared_files("ds_configs"))["zero_optimization"]["offload_optimizer"]
    assert (offload["device"], offload["nvme_path"]) == ("nvme", "/local_nvme")
    for overrides in ({}, {"zero_optimization": {"offload_optimizer": {"nvme_path": "swap"}}}):
        section = told.deepspeed.model_copy(update={"overrides": overrides})
        with pytest.raises(ConfigError, match=r"nvme_path=/local_nvme: a directory"):
            planning.make(told.model_copy(update={"deepspeed": section}), shared_files("ds_configs"))
