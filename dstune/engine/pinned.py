"""How torch takes pinned memory of the host, where offloaded states and gradients lie."""

import torch
from torch.torch_version import TorchVersion

from dstune.planning.placement import ROUNDED_PINNED

_OPTION = "pinned_max_cached_size_mb"
_SINCE = "2.13"
"""Of torch. One that does not know the option raises at it."""


def take_no_more_than_asked() -> None:
    """Of pieces above `ROUNDED_PINNED` bytes, which torch rounds up to a power of two otherwise: half of a host can go for nothing.

    Before the first piece is pinned. A person's own settings of torch's allocators stay, and where they say how memory is pinned,
    nothing changes. NOTE: such a piece is not kept for the next one either, which suits what lives as long as the run. The
    allocator's option of the threshold for the rounding alone is not for torch 2.13: it hands kept pieces out that are too short
    (pytorch/pytorch#192722).
    """
    if TorchVersion(torch.__version__) < _SINCE:  # the benchmark for GPUs runs on what it finds
        return
    settings = torch._C._accelerator_getAllocatorSettings()
    if "pinned_max_" not in settings:
        ours = f"{_OPTION}:{ROUNDED_PINNED >> 20}"
        torch._C._accelerator_setAllocatorSettings(",".join(filter(None, [settings, ours])))
