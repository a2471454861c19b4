"""Training states on NVMe: whether they can be kept there, and a folder for each worker that a dead one does not leave for ever."""

import copy
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dstune.engine.parameters import is_partitioned
from dstune.errors import ConfigError, Problem
from dstune.planning.reachable import uses_nvme

_PREFIX = "dstune-swap-"
_LOCK = "owner.lock"


def require_async_io() -> None:
    """Raises ConfigError where DeepSpeed's reader and writer of NVMe cannot be compiled on this machine."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import is_ninja_available

    builder: Any = AsyncIOBuilder()
    missing = [] if is_ninja_available() else ["ninja"]
    if not builder.is_compatible(verbose=False):
        missing.append("libaio, or a C++ compiler")
    if missing:
        came = f"'nvme', but DeepSpeed's async_io cannot be built here: {' and '.join(missing)} is missing"
        do = "Install libaio-dev, g++ and ninja on every node, or offload to the CPU."
        raise ConfigError(Problem("deepspeed: zero_optimization.offload_optimizer.device", came, "cpu", do))


class SwapFolder:
    """A folder of this process's own below `parent`; gone with the process, or with the next one that makes one there."""

    def __init__(self, parent: Path, section: str = "offload_optimizer") -> None:
        """For what `section` of `zero_optimization` says. Raises ConfigError where `parent` cannot be written."""
        self._section = section
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with _alone(parent):
                for folder in parent.glob(_PREFIX + "*"):
                    _remove_if_left(folder)
                self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
                self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
        except OSError as error:
            where = f"deepspeed: zero_optimization.{section}.nvme_path"
            raise ConfigError(Problem(where, f"{parent}: {error.strerror or error}", "a writable directory")) from None
        self._end = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def put_into(self, ds_config: dict[str, Any]) -> None:
        """Have DeepSpeed swap into this folder."""
        ds_config["zero_optimization"][self._section]["nvme_path"] = str(self.path)


def weights_in_memory(ds_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config to build a model by: weights that belong on NVMe are filled in main memory first."""
    config = copy.deepcopy(dict(ds_config))
    if uses_nvme(config, "offload_param"):
        config["zero_optimization"]["offload_param"]["device"] = "cpu"
    return config


def weights_to_nvme(module: torch.nn.Module, ds_config: Mapping[str, Any]) -> None:
    """Move this worker's pieces of the weights to NVMe, from where DeepSpeed fetches them for each pass; below 1 MiB they stay.

    Before the engine is made. A collective. Raises ConfigError where a piece is larger than DeepSpeed's buffers.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    parameters: list[Any] = list(module.parameters())
    cut = [parameter for parameter in parameters if is_partitioned(parameter)]
    cut[0].convert_to_zero_parameters(param_list=[one for one in parameters if not is_partitioned(one)])
    swapper = AsyncPartitionedParameterSwapper(DeepSpeedConfig(dict(ds_config)), cut[0].dtype)
    for parameter in parameters:
        parameter.nvme_swapper = swapper
        piece = parameter.ds_tensor
        if not swapper.swappable_tensor(param=parameter):
            continue
        if piece.ds_numel > swapper.elements_per_buffer:
            where, came = "deepspeed: zero_optimization.offload_param.buffer_size", f"{swapper.elements_per_buffer}"
            raise ConfigError(Problem(where, came, f"the elements of the largest piece, {piece.ds_numel}, at least"))
        piece.data = swapper.get_buffer(parameter, piece.ds_numel).copy_(piece)
        piece.final_location = OffloadDeviceEnum.nvme
        swapper.swap_out_and_release([parameter])


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """One process of the machine at a time: a folder that has no owner yet looks as if its owner were dead."""
    lock = os.open(parent / f".{_PREFIX}lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _remove_if_left(folder: Path) -> None:
    """The kernel lets go of a dead process's lock, in whichever container it ran."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR)
    except FileNotFoundError:
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    finally:
        os.close(lock)
    shutil.rmtree(folder, ignore_errors=True)
