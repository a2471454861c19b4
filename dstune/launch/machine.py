"""What this machine has, without torch: its memory, its GPUs as their driver names them; and so what a run's machines are."""

import contextlib
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from dstune.config.schema import ClusterSection, RunConfig
from dstune.launch.forecast import nodes_of, nvme_path
from dstune.planning import hardware

_SECONDS = 20.0
_DEVICE = re.compile(r"\s*(\d+|(GPU|MIG)-\S+)\s*")
"""In CUDA_VISIBLE_DEVICES: a number, or an identifier."""
_CGROUPS = Path("/sys/fs/cgroup")


class Gpu(NamedTuple):
    """One GPU of this machine."""

    name: str
    memory: int
    """Bytes."""


@cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs that `nvidia-smi` lists; none where there is no such program or driver."""
    words = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError):
        listed = subprocess.run(words, capture_output=True, text=True, check=True, timeout=_SECONDS).stdout
        return tuple(_gpu(line) for line in listed.splitlines() if line.strip())
    return ()


def visible(count: int) -> int:
    """Of `count` GPUs of this machine, how many CUDA shows to programs that this one starts (CUDA_VISIBLE_DEVICES)."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return count
    # What comes behind the first that is none (an empty one, -1) does not count.
    return min(count, sum(1 for _ in itertools.takewhile(_DEVICE.fullmatch, named.split(","))))


def usable() -> tuple[Gpu, ...]:
    """Those of `gpus` that workers on this machine get."""
    found = gpus()
    return found[: visible(len(found))]


def _gpu(line: str) -> Gpu:
    name, _, mebibytes = line.rpartition(",")
    return Gpu(name.strip(), int(mebibytes) << 20)


def cores_of_worker(section: ClusterSection, elsewhere: bool = False) -> int:
    """Cores of a worker: as the run file says, else those of a machine with GPUs divided among them, else one.

    `elsewhere`: workers may be on other machines, of whose cores nobody knows here; one then.
    """
    if section.cpus_per_worker is not None:
        return section.cpus_per_worker
    count = 0 if elsewhere or not usable() else len(gpus())
    return max(1, len(os.sched_getaffinity(0)) // count) if count else 1


def processor(cores: int, workers: int) -> hardware.Device:
    """What this machine is to each of `workers` workers that take `cores` of its cores, or share them all where those are fewer."""
    flags: set[str] = set()
    with contextlib.suppress(OSError):  # not Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    core = next(core for flag, core in hardware.CORES.items() if flag in flags or not flag)
    return hardware.cpu(min(cores, (os.cpu_count() or 1) / workers), memory_bytes(), core, cuda_build=_built_for_cuda())


def _built_for_cuda() -> bool:
    """Whether the torch that is installed here wants NVIDIA's libraries: its builds for other systems name them as well."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # one that nobody installed as a package
        wanted = importlib.metadata.requires("torch") or ()
        return sys.platform == "linux" and any(name.startswith("nvidia-") for name in wanted)
    return False


def memory_bytes() -> int:
    """Main memory of this machine, or less where this process's control group (version 2) has a limit."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()])


def _limits() -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # no control groups here
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").rpartition("::")[2].strip().lstrip("/")
        for group in [_CGROUPS / own, *(_CGROUPS / own).parents]:
            with contextlib.suppress(OSError):
                limit = (group / "memory.max").read_text(encoding="ascii").strip()
                found += [int(limit)] if limit.isdigit() else []
    return found


def cluster_of(config: RunConfig, workers: int, elsewhere: bool, by_ray: bool) -> hardware.Cluster | None:
    """The machines of `workers` workers, as far as they are known here; None where they are not.

    `elsewhere`: the workers may be on other machines than this one. A machine without GPUs then says nothing, unless the run file
    names them (`cluster.gpu`). `by_ray`: Ray starts them. Raises UsageError for a device that nobody knows.
    """
    # A task that sees its own GPU alone is still one of several on this machine.
    section, here = config.cluster, gpus() if elsewhere or usable() else ()
    if section.gpu is not None:
        device = hardware.find_device(section.gpu)
    elif here:
        device = hardware.recognised(here[0].name, here[0].memory)
    elif elsewhere or section.gpus_per_node is not None:
        return None
    else:
        device = processor(section.cpus_per_worker or 1, workers)
    nodes, per_node = nodes_of(workers, section.gpus_per_node or len(here) or workers)
    is_here = bool(here) or device.is_cpu
    assumed = section.host_memory is None and not is_here
    host = section.host_memory or (hardware.assumed_host_memory(device, per_node) if assumed else memory_bytes())
    return hardware.Cluster(
        nodes=nodes,
        per_node=per_node,
        device=device,
        host_memory=host,
        nvme=nvme_bytes(config),
        host_assumed=assumed,
        cores=cores_of_worker(section, elsewhere),
        by_ray=by_ray,
    )


def nvme_bytes(config: RunConfig) -> int:
    """Free bytes of the disk that the run's overrides name for states; 0 where they name none that is here."""
    path = nvme_path(config)
    if path is None:
        return 0
    with contextlib.suppress(OSError):
        return shutil.disk_usage(next(place for place in (path, *path.parents) if place.is_dir())).free
    return 0
