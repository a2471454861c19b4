"""What a plan is made for: machines, their accelerators, memory and links. Published figures; a person may give others."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dstune.errors import Problem, UsageError
from dstune.loggers import get_logger

log = get_logger(__name__)

GB = 10**9
GIB = 1 << 30


@dataclass(frozen=True)
class Device:
    """One accelerator, or the share of a CPU that one worker has."""

    memory: int
    """Bytes."""
    flops: float
    """Dense 16-bit FLOP/s at peak, as its maker states them."""
    bandwidth: float
    """Bytes/s of its memory."""
    host_link: float = 55 * GB
    """Bytes/s each way to the host's memory (PCIe 5 x16, as measured)."""
    node_link: float = 400 * GB
    """Bytes/s to the others of its node (NVLink, all-gather)."""
    is_cpu: bool = False
    fp8: bool = True
    """Whether it multiplies 8-bit floats of the formats that `model.fp8` takes."""
    fp32_share: float = 1 / 8
    """Of the 16-bit rate, what products in fp32 reach: a fifteenth on an H100 without TF32."""
    product: int = 0
    """Bytes of a matrix product that a CPU's library compiles and keeps."""
    cuda_build: bool = False
    """Of a CPU: whether the torch that computes on it was built for CUDA, whose libraries it loads all the same."""

    @property
    def kind(self) -> str:
        """What torch calls it: `cpu` or `cuda`."""
        return "cpu" if self.is_cpu else "cuda"


@dataclass(frozen=True)
class Core:
    """Of a processor."""

    flops: float
    """16-bit FLOP/s of which a step reaches a third (`cost.step_seconds`)."""
    fp32_share: float
    """As of a `Device`."""
    product: int
    """The same."""


CORES: Mapping[str, Core] = {
    "amx_bf16": Core(0.6e12, 1 / 8, 1 << 20),
    "avx512_bf16": Core(0.5e12, 0.6, 614 << 10),
    "": Core(0.05e12, 1.0, 1 << 20),
}
"""A flag of a processor -> what that makes of a core. Measured on an Intel with AMX, whose products alone reach 1.2e12, and on an AMD
without, whose products reach 0.21e12 and steps nearly all of it; the last is guessed. A compiled product: a mixture's run measured with
oneDNN's cache and without.
"""
_CORE_BANDWIDTH = 12 * GB
_LOOPBACK = 0.7 * GB
"""gloo between processes of one machine."""

DEVICES: Mapping[str, Device] = {
    "a100-40gb": Device(40 * GIB, 312e12, 1555 * GB, 24 * GB, 250 * GB, fp8=False),
    "a100-80gb": Device(80 * GIB, 312e12, 2039 * GB, 24 * GB, 250 * GB, fp8=False),
    "h100-80gb": Device(80 * GIB, 989e12, 3350 * GB),
    "h100-pcie": Device(80 * GIB, 756e12, 2000 * GB, 55 * GB, 50 * GB),
    "h100-nvl": Device(93 * GIB, 835e12, 3900 * GB, 55 * GB, 250 * GB),
    "gh200": Device(95 * GIB, 989e12, 4000 * GB, 400 * GB, 400 * GB),
    "h200": Device(140 * GIB, 989e12, 4800 * GB),
    "h800": Device(80 * GIB, 989e12, 3350 * GB, 55 * GB, 180 * GB),
    "h20": Device(95 * GIB, 148e12, 4000 * GB),
    "b200": Device(178 * GIB, 2250e12, 8000 * GB, 55 * GB, 750 * GB),
    "gb200": Device(184 * GIB, 2500e12, 8000 * GB, 400 * GB, 750 * GB),
    "b300": Device(267 * GIB, 2250e12, 8000 * GB, 55 * GB, 750 * GB),
    "a800-80gb": Device(80 * GIB, 312e12, 2039 * GB, 24 * GB, 180 * GB, fp8=False),
    "l40s": Device(45 * GIB, 362e12, 864 * GB, 24 * GB, 24 * GB),
    "l40": Device(45 * GIB, 181e12, 864 * GB, 24 * GB, 24 * GB),
    "a10g": Device(22 * GIB, 70e12, 600 * GB, 24 * GB, 24 * GB, fp8=False),
    "a10": Device(22 * GIB, 125e12, 600 * GB, 24 * GB, 24 * GB, fp8=False),
    "l20": Device(45 * GIB, 119e12, 864 * GB, 24 * GB, 24 * GB),
    "rtx-a6000": Device(47 * GIB, 155e12, 768 * GB, 24 * GB, 24 * GB, fp8=False),
    "l4": Device(22 * GIB, 121e12, 300 * GB, 24 * GB, 24 * GB),
    "rtx-3090": Device(24 * GIB, 71e12, 936 * GB, 24 * GB, 24 * GB, fp8=False),
    "rtx-4090": Device(24 * GIB, 165e12, 1008 * GB, 24 * GB, 24 * GB),
    "rtx-5090": Device(32 * GIB, 210e12, 1792 * GB, 50 * GB, 50 * GB),
    "mi300x": Device(192 * GIB, 1307e12, 5300 * GB, 55 * GB, 300 * GB, fp8=False),
}
"""`--gpu NAME` -> the device. Sources: the makers' data sheets (dense bf16, no sparsity); memory as drivers report it, rounded down."""


NETWORK = 50 * GB
"""Bytes/s of one device to other machines where nobody said: a card of 400 Gbit/s for each, as in machines made for training."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal machines with equal devices, one worker each."""

    nodes: int
    per_node: int
    device: Device
    host_memory: int
    """Bytes of one machine."""
    nvme: int = 0
    """Bytes of one machine's fast disk; 0: none that may be used."""
    cores: int = 1
    """Of each worker, for the optimizer where it runs on the host."""
    host_bandwidth: float = 200 * GB
    """Bytes/s of the host's memory."""
    network: float = NETWORK
    """Bytes/s of one device to other machines."""
    nvme_rate: float = 5 * GB
    """Bytes/s of one machine's fast disk."""

    host_assumed: bool = False
    """Whether nobody said what the host's memory is."""
    by_ray: bool = True
    """Whether Ray starts the workers."""
    network_assumed: bool = True
    """Whether nobody said what `network` is."""

    @property
    def workers(self) -> int:
        return self.nodes * self.per_node

    @property
    def host_rate(self) -> float:
        """Bytes/s of the host's memory that one worker's cores reach while all of them work."""
        return min(self.cores * _CORE_BANDWIDTH, self.host_bandwidth / self.per_node)


_HOST_SHARE = 1.5
"""Host memory of a machine that nobody described, over its devices' (DGX H100: 3.2; a workstation: 2.5; the leanest in clouds: 0.7)."""


def assumed_host_memory(device: Device, per_node: int) -> int:
    """Bytes of the host of `per_node` devices, where nobody said."""
    return int(_HOST_SHARE * device.memory * per_node)


def find_device(name: str, memory: int | None = None) -> Device:
    """The device of that name, with another memory where given. Raises UsageError for an unknown one."""
    known = DEVICES.get(name.lower())
    if known is None:
        asked = name.lower()
        longer = [key for key in DEVICES if key.startswith(asked)]
        near = longer or difflib.get_close_matches(asked, DEVICES, n=1, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UsageError(
            Problem("--gpu", f"{name!r} is no device that the planner knows", ", ".join(DEVICES), hint.strip())
        )
    return known if memory is None else replace(known, memory=memory)


def recognised(name: str, memory: int) -> Device:
    """The device that a driver calls `name` (`NVIDIA H100 80GB HBM3`), with its memory; an unknown one is reckoned as an A100."""
    found = known(name, memory)
    if found is None:
        log.warning("%s is no GPU that dstune knows: reckoned as an a100-80gb; `cluster.gpu` names another", name)
    return found or replace(DEVICES["a100-80gb"], memory=memory, fp8=True)  # a worker finds out


def known(name: str, memory: int) -> Device | None:
    """The same; None for an unknown one."""
    words = name.lower().replace("-", " ").split()
    for key, device in DEVICES.items():
        if all(any(re.match(rf"{part}(?!\d)", word) for word in words) for part in key.split("-")):
            return replace(device, memory=memory)
    return None


def cpu(cores: float, memory: int, core: Core = CORES["amx_bf16"], *, cuda_build: bool = False) -> Device:
    """The share of a machine's CPU that one worker has: so many cores, or less than one."""
    return Device(
        memory,
        core.flops * cores,
        _CORE_BANDWIDTH * cores,
        math.inf,
        _LOOPBACK,
        is_cpu=True,
        fp32_share=core.fp32_share,
        product=core.product,
        cuda_build=cuda_build,
    )
