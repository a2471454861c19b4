"""Files of torch.save, which are pickles, read by torch's restricted reader alone.

The few classes of DeepSpeed's are stand-ins of ours, every other name is refused: nothing that a file names is imported or
called, DeepSpeed's own code included.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from dstune.errors import CheckpointError, Problem
from dstune.loggers import get_logger

log = get_logger(__name__)


class Record:
    """Stands in for a class that a file names: takes what the file sets, and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass


_STAND_INS: Mapping[str, Any] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": int,
    "deepspeed.utils.tensor_fragment.fragment_address": Record,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Record,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Record,
}


_ADVICE = "weights_only"
"""Where torch speaks of it, it says how to run what the file brings: not to be passed on."""


def load(file: Path, skip_objects: bool = False) -> Any:
    """What a file of `torch.save` holds, its tensors mapped. Nothing that it names is imported or called.

    Raises CheckpointError where it cannot be read, or names what is neither torch's nor a record of DeepSpeed's;
    with `skip_objects` the latter are stood in for by empty objects (not so names of modules that torch itself blocks).
    """
    if not file.is_file():  # to open a pipe would be to wait for a writer
        raise CheckpointError(Problem(str(file), "is no file", "a file that torch.save wrote"))
    unknown: list[str] = []
    try:
        unknown = sorted(set(get_unsafe_globals_in_checkpoint(str(file))) - _STAND_INS.keys())
        if unknown and not skip_objects:
            raise _refusal(file, unknown)
        if unknown:
            log.warning("%s: objects of %s are read past", file, ", ".join(unknown))
        stand_ins = [
            *((stand_in, name) for name, stand_in in _STAND_INS.items()),
            *((Record, name) for name in unknown),
        ]
        with safe_globals(stand_ins):
            return torch.load(str(file), map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - what a damaged or hostile file makes torch raise is not foreseeable
        said = " ".join(str(error).split())[:300] or repr(error)
        if _ADVICE in said:
            said = f"torch's restricted reader refuses it{': ' * bool(unknown)}{', '.join(unknown[:8])}"
        came = f"cannot be read safely: {said}"
        raise CheckpointError(Problem(str(file), came, "a file that torch.save wrote")) from None


def _refusal(file: Path, unknown: list[str]) -> CheckpointError:
    return CheckpointError(
        Problem(
            str(file),
            f"wants to make objects of {', '.join(unknown[:8])}, which could run any code",
            "tensors and DeepSpeed's own records",
            "They may be what the trainer added (`client_state`): --skip-objects reads past them, and runs nothing of theirs.",
        )
    )


def require_checksums(file: Path) -> None:
    """torch.save notes a CRC-32 of every tensor, and torch.load does not look at them. Raises CheckpointError."""
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(Problem(str(file), f"is damaged: {error}")) from None
    if damaged is not None:
        raise CheckpointError(Problem(str(file), f"is damaged: the checksum of {damaged} does not match its bytes"))
