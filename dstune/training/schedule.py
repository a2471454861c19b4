"""The learning rate as a function of the step alone, so that a resume needs nothing to be carried over."""

import math
from collections.abc import Callable, Mapping

from dstune.config.train import TrainSection

_FALLS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "1-sqrt": lambda done: 1.0 - math.sqrt(done),
}
"""From 1 at the beginning (`done` = 0) of a decay to 0 at its end (1)."""


def warmup_steps(train: TrainSection, total_steps: int) -> int:
    """Steps of linear warm-up; `warmup_ratio` is of all steps, rounded up."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return math.ceil((train.warmup_ratio or 0.0) * total_steps)


def learning_rate(train: TrainSection, step: int, total_steps: int) -> float:
    """The rate of update `step` (from 0) of `total_steps`.

    Warm-up rises linearly and reaches the peak at its last step. Then cosine (half a wave) and linear fall such that they would
    reach `min_lr_ratio` of the peak at `total_steps`; wsd does so in the last `decay_ratio` of all steps, rounded up, and stays
    at the peak before; constant stays. The last update has a rate above zero.
    """
    warm = warmup_steps(train, total_steps)
    if step < warm:
        return train.lr * (step + 1) / warm
    if train.schedule == "constant":
        return train.lr
    start, shape = warm, train.schedule
    if train.schedule == "wsd":
        assert train.decay_ratio is not None and train.decay_shape is not None
        start, shape = max(warm, total_steps - math.ceil(train.decay_ratio * total_steps)), train.decay_shape
    done = max(0, step - start) / max(1, total_steps - start)
    return train.lr * (train.min_lr_ratio + (1.0 - train.min_lr_ratio) * _FALLS[shape](done))
