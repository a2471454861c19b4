"""Building a model such that its weights are partitioned from the start (ZeRO-3), and DeepSpeed's settings that dstune relies on."""

import contextlib
import copy
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dstune.engine.swapping import SwapFolder, load_async_io, require_async_io
from dstune.errors import ConfigError, Problem
from dstune.planning.placement import WEIGHT_BUFFERS
from dstune.planning.reachable import (
    fitted,
    small_buffers,
    streamed,
    unreachable,
    uses_nvme,
    weights_on_nvme,
    without_gpus,
)

DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""`model.dtype` of the run file as torch's."""

REQUIRED: Mapping[str, Any] = {
    # dstune accumulates itself: the loss is weighted over the whole global batch, so DeepSpeed must not divide again.
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
}
"""What the engine cannot work without; a DeepSpeed config that says otherwise is refused."""

DEFAULTS: Mapping[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 2**31 - 1,
    # Gradients of micro-batches and workers are summed in fp32: the loss curve does not depend on the split.
    "data_types": {"grad_accum_dtype": "fp32"},
    "communication_data_type": "fp32",
    # Or its class for ZeRO-1 keeps all gradients of a backward pass in 16 bits as well until the update.
    "bf16": {"immediate_grad_update": True},
    # It would have every forward pass wait until the GPU has done all that it was asked before.
    "timers": {"throughput": {"enabled": False}},
}
"""What the engine adds where the DeepSpeed config is silent."""


def stage_of(ds_config: Mapping[str, Any]) -> int:
    """The ZeRO stage, 1 to 3. Raises ConfigError for any other."""
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        raise ConfigError(Problem("deepspeed: zero_optimization.stage", f"{stage!r}", "1, 2 or 3"))
    return stage


def complete(ds_config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """`ds_config` with the precision sections for `dtype`, `REQUIRED` and `DEFAULTS` filled in.

    Raises ConfigError where it contradicts them, or brings an optimizer or a scheduler (those are the run file's).
    """
    config = copy.deepcopy(streamed(ds_config))
    required = {
        **REQUIRED,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "fp16": {"enabled": dtype is torch.float16},
    }
    problems = [
        Problem(f"deepspeed: {key}", "is set", do="Remove it; the run file's `train` section says it.")
        for key in ("optimizer", "scheduler")
        if key in config
    ]
    problems += unreachable(config)
    problems += [] if torch.cuda.is_available() else without_gpus(config)
    config = fitted(config, dist.get_world_size()) if dist.is_initialized() else config
    _fill(config, required, problems)
    _fill(config, DEFAULTS, None)
    if problems:
        raise ConfigError(problems)
    return config


def _fill(config: dict[str, Any], values: Mapping[str, Any], problems: list[Problem] | None, path: str = "") -> None:
    """Add `values` to `config` where it has none; a different value is a problem where `problems` are collected."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            _fill(config.setdefault(key, {}), value, problems, f"{path}{key}.")
        elif config.setdefault(key, value) != value and problems is not None:
            problems.append(
                Problem(f"deepspeed: {path}{key}", f"{config[key]!r}", f"{value!r}, which dstune sets itself")
            )


def computes_fp16() -> bool:
    """Whether DeepSpeed trains in fp16 here: on GPUs, and on CPUs with instructions for it."""
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_fp16_supported())


def _swap_weights(config: dict[str, Any], largest: int | None) -> SwapFolder:
    """Have DeepSpeed keep weights in a folder of this process's own, with buffers for the `largest` one's piece where it says no size."""
    offload = config["zero_optimization"]["offload_param"]
    folder = SwapFolder(Path(offload["nvme_path"]), "offload_param")
    folder.put_into(config)
    offload.setdefault("buffer_count", WEIGHT_BUFFERS)
    if largest is not None:
        offload.setdefault("buffer_size", -(-largest // dist.get_world_size()))
    return folder


@contextlib.contextmanager
def construction(ds_config: Mapping[str, Any], dtype: torch.dtype, largest: int | None = None) -> Iterator[None]:
    """Modules built inside have parameters of `dtype`; under ZeRO-3 each worker keeps only its piece of every parameter.

    `world.init` must have been called. Every worker builds the same modules in the same order, and the same values, or sets them
    afterwards: nothing is sent. `largest`: elements of the largest parameter, for the buffers of weights on NVMe.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    class Unsent(Init):
        """DeepSpeed sends worker 0's values of every parameter to all, the whole model. They are set later, piece by piece."""

        folder: SwapFolder | None
        """Of the weights on NVMe: it goes when the last of these parameters, which hold this object, has gone."""

        def _zero_init_param(self, param: torch.nn.Parameter) -> None:
            self._convert_to_deepspeed_param(param)
            param.partition()

    # NOTE: zero.Init replaces torch's constructors while it is open, and torch._dynamo cannot be imported then.
    importlib.import_module("torch._dynamo")

    config = complete(ds_config, dtype)
    if dtype is torch.float16 and not computes_fp16():
        raise ConfigError(
            Problem("model.dtype", "'fp16', which the processor of this machine cannot compute", "bf16 or fp32")
        )
    for section, wanted in {"offload_optimizer": uses_nvme(config), "offload_param": weights_on_nvme(config)}.items():
        if wanted:
            require_async_io(section)
            load_async_io()
    if problems := small_buffers(config, largest or 0, dist.get_world_size(), dtype.itemsize):
        raise ConfigError(problems)
    folder = _swap_weights(config, largest) if weights_on_nvme(config) else None
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # NOTE: of a `dtype` given here DeepSpeed makes bf16 on every processor that cannot compute fp16; the config's it takes as it is.
        made = Unsent(config_dict_or_path=config, enabled=stage_of(config) == 3)
        made.folder = folder
        with made:
            yield
    finally:
        torch.set_default_dtype(before)
