"""Whether a run of `tools/bench gpu` fits its device: by dstune's planner, with states of other sizes than a run of dstune has."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dstune.planning import memory
from dstune.planning.process import GPU_PROCESS
from dstune.planning.shapes import ModelShape

_USED = 0.95
"""Of a device's memory, at most: the planner is some percent off."""


class States(NamedTuple):
    """Bytes a parameter of what training keeps beside the weights."""

    masters_and_moments: float = 12.0
    sums: float = 4.0
    """Of the gradients."""
    host: float = 0.0
    """Bytes in main memory."""
    staged: int = 0
    """Bytes of the device, whatever it trains, for moments on their way in and out."""


FP32 = States()
BF16 = States(masters_and_moments=4.0, sums=2.0)
"""The weights are their own masters."""


def needed(
    shape: ModelShape, ds_config: Mapping[str, Any], tokens: int, states: States = FP32, recompute: bool = False
) -> dict[str, int]:
    """Bytes of the device by part, for micro-batches of `tokens`, all of them targets of a fused loss."""
    work = memory.Work(
        dtype="bf16",
        optimizer="adamw",
        world_size=1,
        tokens=tokens,
        supervised=tokens,
        recompute=recompute,
        fused_loss=True,
    )
    parts = dict(memory.estimate(shape, memory.Placement.of(ds_config), work, GPU_PROCESS).device)
    parts["masters and moments"] = int(states.masters_and_moments * shape.trained)
    parts["gradient sums"] = int(states.sums * shape.trained)
    parts["staged moments"] = states.staged
    parts["fragments"] = int(GPU_PROCESS.fragments * sum(parts[name] for name in parts if name != "fragments"))
    return parts


def room() -> int:
    """Bytes of this device's memory that may be used."""
    if torch.cuda.is_available():
        return int(_USED * torch.cuda.mem_get_info()[1])
    return int(_USED * main_memory())


def main_memory() -> int:
    """Bytes that this machine has."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))


def most_rows(candidates: Sequence[int], bytes_for: Callable[[int], int]) -> int | None:
    """The first of the numbers of rows, the largest first, that fits; None: not even the last."""
    return next((rows for rows in candidates if bytes_for(rows) <= room()), None)


def too_large(what: str, wanted: int) -> str:
    """The line that says why something is left out."""
    return f"{what} takes {wanted / 1e9:.1f} GB by the planner, and {room() / 1e9:.1f} GB may be used here"
