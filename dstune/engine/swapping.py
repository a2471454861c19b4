"""States and weights on NVMe: whether they can be kept there, and a folder for each worker that a dead one does not leave for ever."""

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dstune.errors import ConfigError, Problem

_PREFIX = "dstune-swap-"
_LOCK = "owner.lock"
_COMPILED = ("async_io", "pin_memory")
_BUFFERS = 4
"""DeepSpeed's own number, for the weights, Adam's moments and the gradient."""


def require_async_io(section: str = "offload_optimizer") -> None:
    """Raises ConfigError where DeepSpeed's reader and writer of NVMe, which `section` wants, cannot be compiled on this machine."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import is_ninja_available

    builder: Any = AsyncIOBuilder()
    missing = [] if is_ninja_available() else ["ninja"]
    if not builder.is_compatible(verbose=False):
        missing.append("libaio, or a C++ compiler")
    if missing:
        came = f"'nvme', but DeepSpeed's async_io cannot be built here: {' and '.join(missing)} is missing"
        do = "Install libaio-dev, g++ and ninja on every node, or offload to the CPU."
        raise ConfigError(Problem(f"deepspeed: zero_optimization.{section}.device", came, "cpu", do))


def load_async_io() -> None:
    """Load it, compiled where that was not done yet: some minutes, in which this machine's other workers wait."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    root.mkdir(parents=True, exist_ok=True)
    builder: Any = AsyncIOBuilder()
    with _alone(root):
        forget_compilations(root)
        builder.load(verbose=False)


def forget_compilations(root: Path) -> None:
    """Remove the locks that killed compilations of `load_async_io` left below `root`: torch would wait for them for ever.

    To be called by one process at a time, which compiles nothing meanwhile.
    """
    for name in _COMPILED:
        for lock in (*root.glob(f"{name}/lock"), *root.glob(f"*/{name}/lock")):
            lock.unlink(missing_ok=True)


_living: "weakref.WeakSet[SwapFolder]" = weakref.WeakSet()


def remove_folders() -> None:
    """Remove this process's folders now: whoever started it may end it before it can do so itself. Nothing is trained afterwards."""
    for folder in list(_living):
        folder.remove()


class SwapFolder:
    """A folder of this process's own below `parent`; gone with the process, or with the next one that makes one there."""

    def __init__(self, parent: Path, section: str = "offload_optimizer") -> None:
        """Raises ConfigError where `parent` cannot be written. `section`: of the DeepSpeed config, the one that names it."""
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
        _living.add(self)

    def remove(self) -> None:
        """Remove it now."""
        self._end()

    def put_into(self, ds_config: dict[str, Any], more_states: int = 0) -> None:
        """Have DeepSpeed swap into this folder, with buffers for `more_states` than it was told of."""
        offload = ds_config["zero_optimization"][self._section]
        offload["nvme_path"] = str(self.path)
        if more_states:
            offload["buffer_count"] = offload.get("buffer_count", _BUFFERS) + more_states


def require_buffers(module: torch.nn.Module) -> None:
    """Raises ConfigError where a pass would want more weights from NVMe at once than there are buffers. After the engine was made."""
    swappers: list[Any] = [parameter.nvme_swapper for parameter in _swapped(module, whole=True)]
    if not swappers:
        return
    wanted = _gathered_at_once(module)
    if wanted > swappers[0].param_buffer_count:
        where = "deepspeed: zero_optimization.offload_param.buffer_count"
        came = f"{swappers[0].param_buffer_count}, and a module of the model reads {wanted} weights at once"
        raise ConfigError(Problem(where, came, f"at least {wanted}"))


def _gathered_at_once(module: torch.nn.Module) -> int:
    """A module's own weights are there while those of what it calls are; a leaf's are there together."""
    from deepspeed.utils import z3_leaf_module

    if z3_leaf_module(module):
        return len(_swapped(module, whole=True))
    inside = len(_swapped(module, whole=False)) + max(map(_gathered_at_once, module.children()), default=0)
    return max(inside, _kept_for_recomputing(module))


def _kept_for_recomputing(module: torch.nn.Module) -> int:
    """DeepSpeed keeps the frozen weights of a layer that is computed again until a part of it has had its backward pass."""
    recomputed = [part for part in module.modules() if getattr(part, "gradient_checkpointing", False)]
    if recomputed != [module]:  # transformers marks the layers, and some of what is around them
        return 0
    swapped = _swapped(module, whole=True)
    frozen = sum(not parameter.requires_grad for parameter in swapped)
    return frozen + (frozen < len(swapped))


def _swapped(module: torch.nn.Module, whole: bool) -> list[Any]:
    """The parameters of `module`, or of the whole of it, that are on NVMe."""
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    parameters: Iterable[Any] = module.parameters(recurse=whole)
    pieces = [(parameter, getattr(parameter, "ds_tensor", None)) for parameter in parameters]
    return [
        parameter for parameter, piece in pieces if piece is not None and piece.final_location == OffloadDeviceEnum.nvme
    ]


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
