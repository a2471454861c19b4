"""ZeRO-3's reduction of gradients between CPUs, without the copies that DeepSpeed makes of them on their way.

DeepSpeed 0.19 copies each gradient into a bucket in fp32, the bucket into the order of the workers, and what it receives into the
sums: for 58 M parameters on two workers a quarter of a step, half of it copies. Here gradients stay where the backward pass left them
until their bucket is full, and the means go where they are summed up (`exchange.DirectBackend.mean_of_pieces`).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

_REDUCE = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"
_SUMS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


def reduce_directly(zero: Any) -> None:
    """Have `zero`, DeepSpeed's optimizer of stage 3 on a CPU, reduce so. `communication.timed` must have been called."""
    zero.contiguous_gradients = False
    for bucket in zero.ipg_buckets.values():
        bucket.buffer = None
    setattr(zero, _REDUCE, _Reduction(zero).means)


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
            sums = getattr(zero, _SUMS)
            return [
                sums[parameter.ds_id].narrow(0, 0, length)
                for parameter, length in zip(parameters, lengths, strict=True)
            ]
        return list(torch.empty(sum(lengths), dtype=torch.float32).split(list(lengths)))


def _own_length(parameter: Any, rank: int) -> int:
    """Elements of the parameter that are this worker's, padding left out."""
    size = parameter.partition_numel()
    return max(0, min(size, parameter.ds_numel - rank * size))
