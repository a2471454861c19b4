"""Where this worker's piece of a parameter is while a model is built: all of it, or (ZeRO-3) a slice of the flattened tensor."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class LocalPiece:
    """The elements `start` to `stop` of a flattened parameter, as this worker holds them."""

    start: int
    stop: int
    tensor: torch.Tensor
    """One-dimensional view of `stop - start` elements; writing to it sets the weights."""


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The whole parameter's shape, however it is partitioned."""
    return tuple(parameter.ds_shape) if is_partitioned(parameter) else tuple(parameter.shape)


@contextlib.contextmanager
def local_piece(parameter: Any) -> Iterator[LocalPiece]:
    """This worker's piece, to be read and set inside. Only before the engine is made: it takes its own copies of the weights.

    ZeRO-3 cuts a parameter of n elements into ceil(n / W) each; the last workers' pieces may be short or empty. One that waits on
    NVMe is read, and written back afterwards.
    """
    if not is_partitioned(parameter):
        yield LocalPiece(0, parameter.numel(), parameter.detach().view(-1))
    elif not on_nvme(parameter):
        yield _piece(parameter)
    else:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
        yield _piece(parameter)
        parameter.nvme_swapper.swap_out_and_release([parameter])


def _piece(parameter: Any) -> LocalPiece:
    piece = parameter.ds_tensor
    start = min(dist.get_rank(parameter.ds_process_group) * piece.numel(), parameter.ds_numel)
    stop = min(start + piece.numel(), parameter.ds_numel)
    return LocalPiece(start, stop, piece.detach().view(-1)[: stop - start])


@contextlib.contextmanager
def whole(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, every partitioned parameter is an uninitialised full tensor on the CPU; afterwards each worker keeps its piece.

    No communication: what is written must be the same on every worker. Parameters that are whole already stay as they are.
    """
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    before = [parameter.data for parameter in partitioned]
    try:
        for parameter in partitioned:
            parameter.data = torch.empty(full_shape(parameter), dtype=parameter.dtype, device="cpu")
        yield
        for parameter in partitioned:
            with local_piece(parameter) as piece:
                piece.tensor.copy_(parameter.data.view(-1)[piece.start : piece.stop])
    finally:
        for parameter, data in zip(partitioned, before, strict=True):
            parameter.data = data


def combined(parameter: Any, value: torch.Tensor, how: Literal["sum", "max"]) -> torch.Tensor:
    """The sum or the largest of every worker's `value`, where they hold `parameter` in pieces (a collective then); else `value`."""
    if not is_partitioned(parameter):
        return value
    from deepspeed.accelerator import get_accelerator

    # NCCL takes only what is on its GPU; a piece may be in main memory.
    gathered = value.to(get_accelerator().current_device_name())
    dist.all_reduce(gathered, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how], parameter.ds_process_group)
    return gathered


def share(module: torch.nn.Module, parameters: Iterable[torch.nn.Parameter]) -> None:
    """`module` reads `parameters` of other modules: on ZeRO-3 have them gathered for its passes too. Before the engine is made."""
    import deepspeed

    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)


def forget_copies(module: torch.nn.Module) -> None:
    """Drop the node's own copies of the weights (hpZ), so that the next pass makes them again.

    NOTE: DeepSpeed makes them as a model is built, of weights that nobody has read yet, and trains with them without a word.
    """
    parameters: Iterable[Any] = module.parameters()
    for parameter in parameters:
        if is_partitioned(parameter):
            parameter.ds_secondary_tensor = None


def on_nvme(parameter: Any) -> bool:
    """Whether ZeRO-3 keeps its pieces on NVMe, and this worker's is not in memory now."""
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus

    return is_partitioned(parameter) and parameter.ds_tensor.status is PartitionedParamStatus.NOT_AVAILABLE


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 holds it in pieces."""
    return hasattr(parameter, "ds_tensor")
