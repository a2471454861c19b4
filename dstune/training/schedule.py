"""The learning rate as a function of the step alone, so that a resume needs nothing to be carried over."""

import math

from dstune.config.train import TrainSection


def warmup_steps(train: TrainSection, total_steps: int) -> int:
    """Steps of linear warm-up; `warmup_ratio` is of all steps, rounded up."""
    if train.warmup_steps is not None:
        return train.warmup_steps
    return math.ceil((train.warmup_ratio or 0.0) * total_steps)


def learning_rate(train: TrainSection, step: int, total_steps: int) -> float:
    """The rate of update `step` (from 0) of `total_steps`.

    Warm-up rises linearly and reaches the peak at its last step; then cosine (half a wave) or linear fall that would
    reach zero at `total_steps`, or the constant peak. The last update has a rate above zero.
    """
    warm = warmup_steps(train, total_steps)
    if step < warm:
        return train.lr * (step + 1) / warm
    if train.schedule == "constant":
        return train.lr
    done = (step - warm) / max(1, total_steps - warm)
    if train.schedule == "linear":
        return train.lr * (1.0 - done)
    return train.lr * 0.5 * (1.0 + math.cos(math.pi * done))
