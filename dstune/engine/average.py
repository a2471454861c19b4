"""The exponential moving average of the weights: one more tensor beside each flat master, where the optimizer's states are.

So it is partitioned, offloaded and swapped as they are, and checkpoints keep it by name, for any world.
"""

from typing import Any

import torch

from dstune.protocols import AVERAGE


class Average:
    """Follows every update of `optimizer`: average = decay * average + (1 - decay) * weights, in fp32. A skipped step changes nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer, decay: float) -> None:
        self._optimizer, self._decay = optimizer, decay
        optimizer.register_step_post_hook(self._follow)

    def start(self, flat: torch.Tensor) -> None:
        """Begin at the weights as they are."""
        self._optimizer.state[flat][AVERAGE] = flat.detach().clone()

    @torch.no_grad()
    def _follow(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # DeepSpeed leaves in the groups what it had updated now: all, one group's, or one piece that is in memory for the moment.
        for group in optimizer.param_groups:
            for flat in group["params"]:
                optimizer.state[flat][AVERAGE].lerp_(flat, 1.0 - self._decay)
