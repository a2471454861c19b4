"""Where DeepSpeed keeps this worker's fp32 masters and moments, parameter by parameter, on ZeRO-3 and on ZeRO-1 and 2."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dstune.engine.parameters import full_shape


@dataclass(frozen=True)
class Piece:
    """What this worker owns of one parameter: a run of its elements, or none, and where they stand in a flat fp32 tensor."""

    name: str
    """The parameter's, at run time."""
    shape: tuple[int, ...]
    """The whole parameter's shape."""
    offset: int = 0
    """First element, in the flattened parameter."""
    length: int = 0
    start: int = 0
    """First element, in the flat tensor."""


class Partitions(Protocol):
    """What differs between the stages."""

    def flats(self) -> list[torch.Tensor]:
        """The fp32 tensors that the optimizer updates, in its order."""
        ...

    def group(self, flat: torch.Tensor) -> int:
        """The number of the optimizer's parameter group that `flat` belongs to."""
        ...

    def parameters(self, flat: torch.Tensor) -> list[torch.nn.Parameter]:
        """Whose elements `flat` holds, on this worker or on another: the same ones in the same order everywhere."""
        ...

    def piece(self, name: str, parameter: torch.nn.Parameter) -> Piece:
        """This worker's elements of `parameter`, padding left out."""
        ...

    def resident(self, flat: torch.Tensor, changed: bool = False) -> AbstractContextManager[None]:
        """Inside, `flat` and the optimizer's states of it are in memory; what is written there stays where `changed` says so."""
        ...

    def refresh(self) -> None:
        """Make the forward weights follow the fp32 tensors. A collective call; only before the first forward pass."""
        ...

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that was skipped."""
        ...


class Stage3Partitions:
    """ZeRO-3: every flattened parameter is cut into `world_size` equal pieces, the last ones padded.

    A parameter of 10 elements on 3 workers: pieces of 4, at 0, 4 and 8; worker 2 holds 2 elements and 2 of padding.
    """

    def __init__(self, optimizer: Any, rank: int) -> None:
        self._optimizer = optimizer
        self._rank = rank

    def flats(self) -> list[torch.Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def group(self, flat: torch.Tensor) -> int:
        return self._optimizer.sub_group_to_group_id[_number(flat, self.flats())]

    def parameters(self, flat: torch.Tensor) -> list[torch.nn.Parameter]:
        return list(self._optimizer.fp16_groups[_number(flat, self.flats())])

    def piece(self, name: str, parameter: torch.nn.Parameter) -> Piece:
        optimizer: Any = self._optimizer
        partitioned: Any = parameter
        _, start, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        offset = min(self._rank * size, partitioned.ds_numel)
        length = min(size, partitioned.ds_numel - offset)
        return Piece(name, full_shape(parameter), offset, length, start)

    @contextmanager
    def resident(self, flat: torch.Tensor, changed: bool = False) -> Iterator[None]:
        optimizer = self._optimizer
        group = _number(flat, self.flats())
        if not optimizer._swappable_optimizer_subgroup(group):  # Small groups stay in memory.
            yield
            return
        optimizer._optimizer_states_and_gradient_swap_in(group)
        try:
            yield
        finally:
            if changed:
                optimizer._optimizer_states_and_gradient_swap_out(group)
            else:
                optimizer._release_swap_buffers(group)

    def refresh(self) -> None:
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        optimizer = self._optimizer
        # NOTE: a parameter gathered by a forward pass (the small ones stay so) would keep its old value, without a word.
        parameters = [parameter for group in optimizer.fp16_groups for parameter in group]
        assert all(parameter.ds_status is ZeroParamStatus.NOT_AVAILABLE for parameter in parameters), "engine not fresh"
        for group, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            with self.resident(master):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def drop_gradients(self) -> None:
        """Nothing to do: the next step's first micro-batch overwrites them."""


class FlatGroupPartitions:
    """ZeRO-1 and 2: the parameters of a group are laid end to end and that tensor is cut: a cut may fall inside a parameter."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._is_bf16_class = is_bf16_class(optimizer)
        self._flats: list[torch.Tensor] = (
            optimizer.fp32_groups_flat_partition if self._is_bf16_class else optimizer.single_partition_of_fp32_groups
        )

    def flats(self) -> list[torch.Tensor]:
        return list(self._flats)

    def group(self, flat: torch.Tensor) -> int:
        return _number(flat, self._flats)

    def parameters(self, flat: torch.Tensor) -> list[torch.nn.Parameter]:
        groups = self._optimizer.bf16_groups if self._is_bf16_class else self._optimizer.bit16_groups
        return list(groups[_number(flat, self._flats)])

    def piece(self, name: str, parameter: torch.nn.Parameter) -> Piece:
        linked: Any = parameter
        mapping = linked._hp_mapping
        if mapping is None:
            return Piece(name, tuple(parameter.shape))
        address = mapping.hp_fragment_address
        return Piece(name, tuple(parameter.shape), mapping.lp_fragment_address.start, address.numel, address.start)

    def resident(self, flat: torch.Tensor, changed: bool = False) -> AbstractContextManager[None]:
        return nullcontext()

    def refresh(self) -> None:
        self._optimizer.update_lp_params()

    def drop_gradients(self) -> None:
        # NOTE: DeepSpeed 0.19.8 goes on adding to a skipped step's sums where the optimizer is offloaded: after one NaN
        # every later step would be skipped as well.
        if not self._is_bf16_class:
            self._optimizer.averaged_gradients = dict.fromkeys(self._optimizer.averaged_gradients)


def is_bf16_class(optimizer: Any) -> bool:
    """DeepSpeed has a class of its own for ZeRO-1 in bf16 with fp32 accumulation."""
    return type(optimizer).__name__ == "BF16_Optimizer"


def _number(flat: torch.Tensor, flats: list[torch.Tensor]) -> int:
    return next(number for number, one in enumerate(flats) if one is flat)


def pieces(partitions: Partitions, module: torch.nn.Module) -> dict[torch.Tensor, list[Piece]]:
    """For each flat tensor its parameters, the same ones in the same order on every worker."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        flat: [partitions.piece(names[id(parameter)], parameter) for parameter in partitions.parameters(flat)]
        for flat in partitions.flats()
    }
