"""One line of metrics.jsonl: what one step was."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer update over one global batch. Seconds are wall-clock, tokens are of all workers together."""

    step: int
    """From 1; the checkpoint of this number holds the state behind this step."""
    epoch: float
    """Passes over the rows so far, this step included."""
    loss: float | None
    """Mean over the global batch's supervised tokens; None where it was not finite."""
    grad_norm: float | None
    """Before clipping; None where it was not finite."""
    lr: float
    tokens: int
    supervised_tokens: int
    rows: int
    batch_digest: str
    """Hash of the sorted example numbers: equal digests = equal data."""
    step_seconds: float
    data_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    """Of the slowest worker, like `data_seconds`."""
    communication_seconds: float
    """For how long a worker stood still for what the workers send each other, of the one that stood longest. It lies inside forward,
    backward and optimizer, and is no further part of the step: what computation hides does not count, waiting for a slower worker does.
    """
    waiting_seconds: float
    """From the end of a worker's own update until all had ended theirs, of the one that waited longest."""
    checkpoint_seconds: float
    """What a save between the last step and this one took."""
    tokens_per_second: float
    supervised_tokens_per_second: float
    mfu: float | None
    """Share of the devices' peak, counted causally; of a CPU's own rate of matrix products. None where nobody counts."""
    peak_memory_bytes: int
    """The largest of the workers: device memory on GPUs, resident memory on CPUs."""
    world: int
    attempt: int
    skipped: bool = False
    """Nothing was updated (loss or gradient not finite); the step keeps its number and its rows."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
