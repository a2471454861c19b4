"""Parameters that no token of a step, or of one of its micro-batches, visits: their gradient is zero.

DeepSpeed 0.19's stage 3 keeps each parameter's sum of gradients from step to step, and lets the first micro-batch overwrite it. Where
that one does not visit the parameter, the last step's gradient stays and is added to, or taken again; where the optimizer is
offloaded, it takes only what the last micro-batch visited. Experts are safe in a leaf module; all else of which a pass may leave
something out is not.
"""

from collections.abc import Sequence
from typing import Any

import torch

from dstune.engine.reduction import sums_of


class Unvisited:
    """Keeps the sums of `zero`, DeepSpeed's optimizer of stage 3, right where a parameter has no gradient."""

    def __init__(self, zero: Any) -> None:
        self._zero = zero
        self._sum_up = zero.partition_grads
        self._handed_over: set[int] = set()
        zero.partition_grads = self._partition_grads
        self._trained = [parameter for group in zero.fp16_groups for parameter in group if parameter.requires_grad]

    def _partition_grads(self, parameters: Sequence[Any], means: Sequence[torch.Tensor]) -> Any:
        zero = self._zero
        if zero.micro_step_id > 0:
            self._forget([each for each in parameters if each.ds_id not in self._visited])
        if zero.is_gradient_accumulation_boundary():
            self._handed_over.update(parameter.ds_id for parameter in parameters)
        return self._sum_up(parameters, means)

    def complete(self) -> None:
        """Right before each update."""
        self._forget([parameter for parameter in self._trained if parameter.ds_id not in self._visited])
        if self._zero.offload_optimizer:
            self._hand_over([parameter for parameter in self._trained if parameter.ds_id not in self._handed_over])
        self._handed_over.clear()

    @property
    def _visited(self) -> set[int]:
        """Since the last update; DeepSpeed's own account."""
        return self._zero._offload_boundary_param_ids

    def _forget(self, parameters: Sequence[Any]) -> None:
        sums = sums_of(self._zero)
        for parameter in parameters:
            sums[parameter.ds_id].zero_()

    def _hand_over(self, parameters: Sequence[Any]) -> None:
        """Their sums to the offloaded optimizer, as DeepSpeed does with those of the last micro-batch.

        NOTE: from the device, where DeepSpeed has the others: their norms are added up, and a sum begun in main memory takes no GPU's.
        """
        from deepspeed.accelerator import get_accelerator

        zero, sums, device = self._zero, sums_of(self._zero), get_accelerator().current_device_name()
        gradients: dict[int, list[torch.Tensor]] = {}
        offsets: dict[int, list[int]] = {}
        for parameter in parameters:
            zero._offload_grad_partition_at_boundary(parameter, sums[parameter.ds_id].to(device), gradients, offsets)
        zero._swap_out_offload_fp32_gradients(gradients, offsets)
