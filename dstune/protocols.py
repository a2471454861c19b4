"""What the rooms above and below agree on: slices of training state, the engine, the control group, executors of attempts.

Each protocol states the whole of its surface: whoever implements it needs nothing else, whoever uses it may use nothing else.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


WEIGHTS = "fp32"
"""The state that a model is made of: its master weights."""
AVERAGE = "ema"
"""Their moving average, where the run keeps one."""
MODEL_STATES = (WEIGHTS, AVERAGE)
"""What is a model by itself. The other states are the optimizer's."""


@dataclass(frozen=True)
class Slice:
    """This worker's piece of one training state of one parameter, cut from the flattened tensor."""

    state: str
    """`fp32` (master weights), `ema`, `exp_avg`, `exp_avg_sq`, …"""
    name: str
    """The parameter's name as `save_pretrained` writes it."""
    shape: tuple[int, ...]
    """The whole state's: the parameter's own, but for statistics that are kept in place of a number for each element."""
    offset: int
    """Where this piece begins in the flattened state, in elements."""
    tensor: Any
    """One-dimensional torch tensor of the piece's elements; a view into the engine where that is possible."""


class Control(Protocol):
    """A small group for agreement among workers, apart from the training's own collectives (gloo, on the CPU)."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    def barrier(self) -> None: ...
    def gather(self, value: T) -> list[T]:
        """Every worker's value, in rank order, on every worker. Values are JSON-like."""
        ...

    def broadcast(self, value: T) -> T:
        """Worker 0's value on every worker."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What one optimizer update was."""

    grad_norm: float
    """Global norm of the gradient before clipping."""
    skipped: bool
    """True where nothing was updated (a non-finite gradient)."""
    scale_falls: bool = False
    """True where it was skipped for a loss scale (fp16's) that was too high, and that has since been lowered or is about to be."""


class Engine(Protocol):
    """The partitioned model and optimizer of one worker. DeepSpeed is behind it, and nothing above knows so."""

    @property
    def module(self) -> Any:
        """The model to call for a forward pass."""
        ...

    def backward(self, loss: Any, last: bool) -> None:
        """Accumulate the gradient of `loss`; `last` marks the step's last micro-batch (the same on every worker)."""
        ...

    def step(self, lr: float) -> StepResult:
        """Clip, update with learning rate `lr`, clear the gradients."""
        ...

    def communication_seconds(self) -> float:
        """For how long this worker has stood still so far for what the workers send each other in forward, backward and update."""
        ...

    def slices(self) -> Iterator[Slice]:
        """Every piece of training state that this worker writes, in a fixed order; all workers' pieces tile the whole.

        A slice's tensor holds only until the next slice is asked for: states on NVMe are in memory group by group.
        """
        ...

    def load(self, fill: Callable[[Slice], None], optimizer_steps: int) -> None:
        """Call `fill` for every slice that this worker wants (it writes `slice.tensor` in place), then make the forward weights follow
        the masters. A slice that is not written stays as it was.

        Only on an engine that has not stepped yet. `optimizer_steps`: updates made so far (Adam's bias correction).
        """
        ...

    @property
    def optimizer_steps(self) -> int:
        """Updates made so far, skipped ones left out."""
        ...

    def extra_state(self) -> dict[str, Any]:
        """JSON-like state beyond slices (fp16's loss scale); empty where there is none."""
        ...

    def load_extra_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class AttemptOutcome:
    """How one attempt of a run's workers ended, as an executor saw it."""

    kind: str
    """`finished` (all workers returned), `failed` (a worker raised or died), `lost` (the cluster or a node went away)."""
    message: str = ""
    """The executor's own words, for the events; the root cause is read from the run directory's failure files."""
    failed_ranks: tuple[int, ...] = field(default=())


class Executor(Protocol):
    """Places, starts and watches the workers of one attempt. Ray Train is one; a plain local one serves tests."""

    def available_workers(self) -> int:
        """How many workers could be placed now."""
        ...

    def run(self, run_directory: str, attempt: int, world_size: int, environment: Mapping[str, str]) -> AttemptOutcome:
        """Start `world_size` workers of `attempt` and block until they are all gone."""
        ...

    def kill(self) -> None:
        """End the running attempt's workers at once (from another thread)."""
        ...

    def close(self) -> None: ...


__all__: Sequence[str] = [
    "AVERAGE",
    "MODEL_STATES",
    "WEIGHTS",
    "AttemptOutcome",
    "Control",
    "Engine",
    "Executor",
    "Slice",
    "StepResult",
]
