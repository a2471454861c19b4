"""ZeRO 1 and 2: gradients are summed over the workers in one order, whatever parts of the model the tokens of each have visited.

DeepSpeed 0.19 sums them in the order in which a backward pass finishes them, and what a pass does not visit not at all. Workers whose
tokens visit different experts would add the gradient of one expert to that of another, without a word; and where the optimizer is
offloaded, a part that no token of a step visits would be updated by its last gradient again. So what a pass may leave out waits for
the end of the backward pass, and is summed then: zeros, where there is no gradient.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from dstune.engine import leaves
from dstune.errors import ConfigError, Problem


class InOneOrder:
    """Has `zero`, DeepSpeed's optimizer of stage 1 or 2 for `module`, sum so. Experts that are modules are found by their build."""

    def __init__(self, zero: Any, module: torch.nn.Module) -> None:
        self._zero = zero
        self._reduce, self._end = (
            zero.reduce_ready_partitions_and_remove_grads,
            zero.overlapping_partition_gradients_reduce_epilogue,
        )
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        # At the end of a step, stage 1 goes through them all anyway.
        waits = _parameters(module, leaves.routed_modules(module))
        self._waiting = waits if zero.partition_gradients or zero.overlap_comm else self._names
        self._summed: set[int] = set()
        self._left_out: list[str] = []
        """Since the last update, of what does not wait: the number of the micro-batch, and the parameter."""
        zero.reduce_ready_partitions_and_remove_grads = self._when_ready
        zero.overlapping_partition_gradients_reduce_epilogue = self._at_the_end

    def _when_ready(self, parameter: Any, group: int) -> None:
        if id(parameter) not in self._waiting:
            # Stage 1 that overlaps is told of each micro-batch, and sums in the last one.
            if self._zero.partition_gradients or self._zero.is_gradient_accumulation_boundary():
                self._summed.add(id(parameter))
            self._reduce(parameter, group)

    def _at_the_end(self) -> None:
        zero = self._zero
        zero.setup_buckets()
        for number, group in enumerate(zero.bit16_groups):
            for parameter in group:
                if not parameter.requires_grad or id(parameter) in self._summed:
                    continue
                if id(parameter) not in self._waiting:
                    self._left_out.append(f"{zero.micro_step_id} {self._names[id(parameter)]}")
                _fill(zero, parameter)
                self._reduce(parameter, number)
        self._summed.clear()
        self._end()

    def complete(self) -> None:
        """Right before each update. Raises ConfigError, on every worker, where some alone visited what does not wait.

        Where that has moved the bounds of DeepSpeed's buckets as well, their sums have other sizes and fail, or wait, before this.
        """
        told, self._left_out = self._left_out, []
        if dist.get_world_size() > 1 and _differ(told, self._zero.dp_process_group):
            names = sorted({one.partition(" ")[2] for one in told})
            came = f"workers' tokens visit different parts of the model (here all but {', '.join(names[:3]) or 'none'})"
            do = "Gradients of one part would be added to those of another. Train with one worker."
            raise ConfigError(Problem("deepspeed: zero_optimization.stage", came, "parts that every token visits", do))


def _parameters(module: torch.nn.Module, inside: Iterable[str]) -> Mapping[int, str]:
    parts = [(name, module.get_submodule(name)) for name in inside]
    return {id(parameter): name for name, part in parts for parameter in part.parameters()}


def _fill(zero: Any, parameter: Any) -> None:
    """A gradient of zero where there is none."""
    if zero.get_gradient_for_reduction(parameter) is not None:
        return
    if zero.use_grad_accum_attribute:
        parameter.grad_accum = torch.zeros_like(parameter, dtype=zero.gradient_accumulation_dtype)
    else:
        parameter.grad = torch.zeros_like(parameter)


def _differ(words: list[str], group: Any) -> bool:
    """Whether they are others elsewhere."""
    digest = int.from_bytes(hashlib.sha256("\n".join(words).encode()).digest()[:4], "big")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ends = torch.tensor([digest, -digest], dtype=torch.int64, device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX, group)
    return int(ends[0]) != -int(ends[1])
