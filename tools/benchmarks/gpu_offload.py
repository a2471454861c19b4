"""The parts of `tools/bench gpu` with an optimizer that is partly in main memory: `offload` and `largest`.

dstune refuses a partial offload, as it could not checkpoint what DeepSpeed makes of it. So DeepSpeed's engine is used underneath, in two
ways. `ratio` is DeepSpeed's own: whole sub-groups of masters, moments and gradients in main memory, updated there by its CPU Adam, which
is compiled at its first use. `split` keeps masters on the device and moves only moments (`gpu_split`). What a way takes, in bytes a
parameter beside the bf16 weights, at a share r of the sub-groups or s of the moments, with g bytes of gradient sums (4, or 2 in bf16):

    ratio: (12 + 4) (1 - r) on the device, (12 + 4) r + g in main memory, as every sub-group has a gradient buffer of its own
    split: 4 + 8 (1 - s) + g on the device, 8 s in main memory
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dstune.engine.construction import complete
from dstune.engine.world import World
from dstune.planning.shapes import ModelShape
from tools.benchmarks.gpu_fit import States, main_memory, needed, room, too_large
from tools.benchmarks.gpu_shapes import MadeUp, Settings, Shape
from tools.benchmarks.gpu_sides import (
    BETAS,
    EPS,
    LR,
    WEIGHT_DECAY,
    Dstune,
    alternate,
    batches,
    peak_bytes,
    sizes,
    spread,
    started,
    zero3,
)
from tools.benchmarks.gpu_split import SplitAdamW
from tools.benchmarks.measures import memory_bytes

NONE, RATIO, SPLIT = "none", "ratio", "split"
HALF = {NONE: 0.0, RATIO: 0.5, SPLIT: 0.75}
"""Shares with which half of an optimizer's 12 bytes a parameter are in main memory."""
_HOST_USED = 0.97
_PROCESS = 4 << 30
"""Bytes of main memory that Python, torch and CUDA take."""
_TOKENS = 2048
"""Of a step of `largest`."""
_SHARES = [number / 20 for number in range(21)]
_LEAN: Mapping[str, Any] = {"data_types": {"grad_accum_dtype": "bf16"}, "communication_data_type": "bf16"}
"""Gradients wait for the update in bf16, as the backward pass makes them; the states are fp32."""
_GROUP = 100_000_000
"""Elements that one update handles."""
_STAGED = 4 * 8 * 3 * _GROUP // 2
"""Bytes of the moments of four updates (kept for the next step, updated, on their way in and out), each over by half a matrix."""


class Underneath:
    """DeepSpeed's engine by the calls that `gpu_sides.Dstune` makes; `share` of the optimizer in main memory, in one of the ways."""

    def __init__(self, module: Any, ds_config: Mapping[str, Any], world: World, way: str, share: float) -> None:
        import deepspeed

        config = complete(ds_config, torch.bfloat16)
        parameters = list(module.parameters())
        optimizer = _optimizer(parameters, way, share)
        if way == RATIO:
            config["zero_optimization"]["offload_optimizer"]["ratio"] = share
        self.module, _, _, _ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.module.set_gradient_accumulation_boundary(last)
        self.module.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        self.module.step()


def _optimizer(parameters: list[Any], way: str, share: float) -> torch.optim.Optimizer:
    settings: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": WEIGHT_DECAY}
    if way == SPLIT:
        split = SplitAdamW(parameters, **settings, host_share=share)
        split.count(sum(parameter.ds_numel for parameter in parameters))
        return split
    if way == RATIO and share < 1.0:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, **settings)
    return torch.optim.AdamW(parameters, fused=True, **settings)


def states_of(way: str, share: float, sums: float) -> States:
    """What a way takes (the module's docstring)."""
    if way == RATIO:
        return States(12 * (1 - share), 4 * (1 - share), 16 * share + sums)
    return States(4 + 8 * (1 - share), sums, 8 * share, _STAGED if share > 0 and torch.cuda.is_available() else 0)


def _config(way: str, lean: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"sub_group_size": _GROUP}
    if way == RATIO:
        # What is pinned is rounded up to a power of two: where every byte counts it is not.
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available() and not lean}
    return zero3(zero_optimization=zero, **(_LEAN if lean else {}))


def speed(settings: Settings, way: str) -> dict[str, Any]:
    """7 B with half of the optimizer in main memory, in one of the ways, or none of it: seconds of its steps, one row at a time.

    Activations are recomputed in all of them: without any offload there is no room for both them and fp32 states.
    """
    # Whole sub-groups in main memory take torch's AdamW, so that a tiny run compiles nothing.
    share = 1.0 if settings.tiny and way == RATIO else HALF[way]
    shape = settings.shape("7b")
    rows = -(-settings.offload_step_tokens // settings.max_length)
    return _trained(settings, shape, way, share, [settings.max_length] * rows, lean=False, steps=settings.steps // 4)


def deepest(settings: Settings, way: str, layers: int) -> dict[str, Any]:
    """Whether so many layers take steps, with the least share of the optimizer in main memory that the device leaves room for."""
    shape = settings.shape("deep")._replace(layers=layers)
    with tempfile.TemporaryDirectory() as place:
        counted = sizes(shape, Path(place))
    tokens = min(_TOKENS, settings.max_length)
    config = _config(way, lean=True)
    share = least_share(counted, way, config, tokens, settings)
    if share is None:
        states = states_of(way, 1.0, 2.0)
        wanted = sum(needed(counted, config, tokens, states, recompute=True).values())
        host = int(states.host * counted.trained) + _PROCESS
        return {"cannot": f"{too_large(f'{layers} layers', wanted)}; {host / 1e9:.0f} GB of main memory at most"}
    if settings.tiny:
        share = 1.0
    return _trained(settings, shape, way, share, [tokens], lean=True, steps=1)


def least_share(
    shape: ModelShape, way: str, config: Mapping[str, Any], tokens: int, settings: Settings
) -> float | None:
    """The least share with which both memories suffice by the planner; None: there is none."""
    host = _HOST_USED * (settings.host_bytes or main_memory()) - _PROCESS
    for share in _SHARES:
        states = states_of(way, share, sums=2.0)
        fits = sum(needed(shape, config, tokens, states, recompute=True).values()) <= room()
        if fits and states.host * shape.trained <= host:
            return share
    return None


def _trained(
    settings: Settings, shape: Shape, way: str, share: float, lengths: list[int], lean: bool, steps: int
) -> dict[str, Any]:
    world, config, states = started(), _config(way, lean), states_of(way, share, 2.0 if lean else 4.0)
    with tempfile.TemporaryDirectory() as place:
        counted = sizes(shape, Path(place))
        predicted = sum(needed(counted, config, max(lengths), states, recompute=True).values())
        if predicted > room():
            return {"cannot": too_large(f"{counted.parameters / 1e9:.1f} B, way {way}", predicted)}
        ours = Dstune(
            shape,
            Path(place),
            config,
            world,
            engine=lambda module, config, world: Underneath(module, config, world, way, share),
            recompute=True,
        )
    rows = batches(MadeUp(lengths, shape.vocabulary, max(lengths)), 1, world.device)
    brief = Settings(tiny=settings.tiny, steps=max(1, steps), warmup=1)
    seconds, losses = alternate({way: lambda: ours.step(rows)}, brief, world.device)
    return {
        "parameters": counted.parameters,
        "layers": shape.layers,
        "share_on_host": share,
        "states_bytes": int(12 * counted.trained),
        "seconds": seconds[way],
        "step_seconds": spread(seconds[way]),
        "tokens_per_second": spread([sum(lengths) / each for each in seconds[way]], 1),
        "loss_of_the_first_step": losses[way],
        "peak_bytes": peak_bytes(),
        "predicted_bytes": predicted,
        "host_bytes": memory_bytes("VmHWM"),
    }
