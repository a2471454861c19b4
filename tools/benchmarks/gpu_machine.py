"""What `tools/bench gpu` runs on."""

import importlib.metadata
import platform
from typing import Any

import torch

from dstune.planning import hardware
from tools.benchmarks.gpu_fit import main_memory

_PACKAGES = ("torch", "transformers", "deepspeed", "liger-kernel", "triton")


def facts(tiny: bool) -> dict[str, Any]:
    """The device, both memories and the versions; `cannot` where there is no GPU and it takes one."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "main_memory_bytes": main_memory(),
    }
    if not torch.cuda.is_available():
        return found if tiny else found | {"cannot": "torch sees no GPU here: --tiny shows that the script runs"}
    device = torch.cuda.get_device_properties(0)
    return found | {
        "gpu": device.name,
        "memory_bytes": device.total_memory,
        "peak_tflops": hardware.recognised(device.name, device.total_memory).flops / 1e12,
        "cuda": torch.version.cuda,
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
