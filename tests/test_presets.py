"""Every DeepSpeed preset: policy only, in keys that the installed DeepSpeed knows, and the stage that its name says.

Those of which no checkpoint could be made are refused, with what to take instead; `tests/engine/test_preset_steps.py` trains the others.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from dstune.config.schema import RunConfig
from dstune.errors import ConfigError
from dstune.paths import shared_files
from dstune.planning import deepspeed as planning

NAMES = planning.preset_names()
REFUSED = ["zero3-superoffload", "zero3-zenflow"]
"""DeepSpeed keeps their states where nobody else reaches them."""

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
    assert made["bf16"] == {"enabled": True}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_checkpoint_could_be_made_of_names_what_to_take_instead(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no checkpoint could be made\. The preset zero3-offload-optimizer"):
        planning.make(config(name), shared_files("ds_configs"))


def test_compiling_by_deepspeed_is_refused_rather_than_ignored() -> None:
    section = config("zero3").deepspeed.model_copy(update={"overrides": {"compile": {"deepcompile": True}}})
    with pytest.raises(
        ConfigError, match=r"compile: is set[\s\S]*`model.compile: layers`[\s\S]*DeepCompile.*in 16 bits"
    ):
        planning.make(config("zero3").model_copy(update={"deepspeed": section}), shared_files("ds_configs"))


def test_a_misspelled_key_of_zero_is_found_before_a_worker_meets_it() -> None:
    section = config("zero3").deepspeed.model_copy(
        update={"overrides": {"zero_optimization": {"reduce_bucket_sise": 5, "max_live_parameters": 9}}}
    )
    with pytest.raises(
        ConfigError, match=r"zero_optimization.reduce_bucket_sise'[\s\S]*'reduce_bucket_size'"
    ) as caught:
        planning.make(config("zero3").model_copy(update={"deepspeed": section}), shared_files("ds_configs"))
    assert len(caught.value.problems) == 1


def test_the_known_keys_of_zero_are_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {field.alias or name for name, field in fields.items()}
    no_more = {"mics_shard_size"}  # of earlier versions, and refused with a reason
    assert set(planning._ZERO_KEYS) - no_more == known - {"legacy_stage1"}, "which can only be off"


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
    zero = {"offload_param": {"device": "nvme", "nvme_path": "/local_nvme"}, "zenflow": {"topk_ratio": 0.1}}
    section = config("zero3").deepspeed.model_copy(update={"overrides": {"zero_optimization": zero}})
    with pytest.raises(ConfigError, match=r"zenflow(.|\n)*offload_param\.device: 'nvme'; expected none or cpu"):
        planning.make(config("zero3").model_copy(update={"deepspeed": section}), shared_files("ds_configs"))


def test_nvme_wants_to_be_told_which_disk() -> None:
    told = config("zero3-nvme")
    offload = planning.make(told, shared_files("ds_configs"))["zero_optimization"]["offload_optimizer"]
    assert (offload["device"], offload["nvme_path"]) == ("nvme", "/local_nvme")
    for overrides in ({}, {"zero_optimization": {"offload_optimizer": {"nvme_path": "swap"}}}):
        section = told.deepspeed.model_copy(update={"overrides": overrides})
        with pytest.raises(ConfigError, match=r"nvme_path=/local_nvme: a directory"):
            planning.make(told.model_copy(update={"deepspeed": section}), shared_files("ds_configs"))
