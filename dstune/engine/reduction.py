"""ZeRO-3's gradients on their way from the backward pass to the update, without the copies that DeepSpeed makes of them.

DeepSpeed 0.19 copies each gradient into a bucket in fp32, the bucket into the order of the workers, what it receives into the sums, the
sums in fp64 for their norm, and once more end to end for the update: a quarter of a step of 58 M parameters and 1,024 tokens on two CPUs.
Here gradients stay where the backward pass left them until their bucket is full, the means go where they are summed up
(`exchange.DirectBackend.mean_of_pieces`), and from there they are measured and taken.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

_REDUCE = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
_RUN = 1 << 10
"""Elements of which fp32 sums up the squares to seven digits; 16 times as many took as long, and gave six."""


def sums_of(zero: Any) -> dict[int, torch.Tensor]:
    """Where `zero`, DeepSpeed's optimizer of stage 3, sums up the gradients of each parameter, by `ds_id`: flat, with its padding."""
    return zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition


def take_sums_as_they_are(zero: Any) -> None:
    """Have `zero`, DeepSpeed's optimizer of stage 3 on any device, update from the sums themselves where they stand end to end."""
    flatten = zero.flatten

    def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return _end_to_end(tensors) if _touch(tensors) else flatten(tensors)

    zero.flatten = flat


def reduce_directly(zero: Any) -> None:
    """Have `zero`, DeepSpeed's optimizer of stage 3 on a CPU, reduce so. `communication.timed` must have been called."""
    zero.contiguous_gradients = False
    for bucket in zero.ipg_buckets.values():
        bucket.buffer = None
    setattr(zero, _REDUCE, _Reduction(zero).means)
    zero.get_grad_norm_direct = _Norm(zero).of


class _Reduction:
    def __init__(self, zero: Any) -> None:
        self._zero = zero

    @torch.no_grad()
    def means(self, parameters: Sequence[Any], _: torch.dtype) -> list[torch.Tensor]:
        """Of each parameter's gradient this worker's piece of the mean over all workers, flat; DeepSpeed copies or adds it to the sums."""
        from deepspeed.comm import comm

        gradients = [parameter.grad for parameter in parameters]
        group = self._zero._get_param_partition_group(parameters[0])
        if dist.get_world_size(group) == 1:
            return [gradient.reshape(-1) for gradient in gradients]
        lengths = [_own_length(parameter, dist.get_rank(group)) for parameter in parameters]
        means = self._places(parameters, lengths)
        comm.cdb.mean_of_pieces(gradients, means, group)
        return means

    def _places(self, parameters: Sequence[Any], lengths: Sequence[int]) -> list[torch.Tensor]:
        """fp32 tensors of these lengths: where nothing is summed up yet, the sums themselves."""
        zero = self._zero
        if zero.micro_step_id == 0 and zero.gradient_accumulation_dtype is torch.float32:
            sums = sums_of(zero)
            return [
                sums[parameter.ds_id].narrow(0, 0, length)
                for parameter, length in zip(parameters, lengths, strict=True)
            ]
        return list(torch.empty(sum(lengths), dtype=torch.float32).split(list(lengths)))


def _own_length(parameter: Any, rank: int) -> int:
    """Elements of the parameter that are this worker's, padding left out."""
    size = parameter.partition_numel()
    return max(0, min(size, parameter.ds_numel - rank * size))


class _Norm:
    """Of a group's gradients, over all workers."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero

    @torch.no_grad()
    def of(self, gradients: Sequence[torch.Tensor], parameters: Sequence[Any], norm_type: float = 2.0) -> torch.Tensor:
        """fp64 []; -1 where it is not finite, which DeepSpeed takes for an overflow. Clipping by another norm than 2 is not offered."""
        from deepspeed.comm import comm

        assert norm_type == 2.0
        total = sum((_square_sum(gradient) for gradient in gradients), torch.zeros(1, dtype=torch.float64))
        comm.cdb.all_reduce(total, group=self._zero._get_param_partition_group(parameters[0]))
        norm = total.sqrt()[0]
        return norm if norm.isfinite() else torch.full_like(norm, -1.0)


def _square_sum(gradient: torch.Tensor) -> torch.Tensor:
    """fp64 [1]: of the norms of runs, in which fp32 loses nothing to speak of."""
    whole = len(gradient) - len(gradient) % _RUN
    norms = [gradient[:whole].view(-1, _RUN), gradient[whole:].view(1, -1)]
    return torch.cat([torch.linalg.vector_norm(each.float(), dim=1) for each in norms]).double().square().sum(0, True)


def _touch(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether they stand in one storage, each right behind the one before."""
    first = tensors[0]
    ends = itertools.accumulate((len(tensor) for tensor in tensors), initial=first.storage_offset())
    storage = first.untyped_storage().data_ptr()
    return all(
        tensor.dim() == 1
        and tensor.is_contiguous()
        and tensor.dtype is first.dtype
        and tensor.untyped_storage().data_ptr() == storage
        and tensor.storage_offset() == begin
        for tensor, begin in zip(tensors, ends, strict=False)
    )


def _end_to_end(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].as_strided([sum(len(tensor) for tensor in tensors)], [1])
