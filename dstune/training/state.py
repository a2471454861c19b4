"""Everything a resume needs beside tensors: small, JSON, written into each checkpoint's state.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from dstune.errors import CheckpointError, Problem

FORMAT = 1
_LOSS_HISTORY = 64


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands after `step` updates."""

    prepared_fingerprint: str
    """The data and its packing: positions mean nothing on another."""
    seed: int
    global_batch_size: int
    total_steps: int
    frozen: str = ""
    """Digest of the base model's weights that are not trained, and so in no checkpoint; empty where all are trained."""
    step: int = 0
    """Steps taken, skipped ones counted: the data position is `step * global_batch_size`."""
    optimizer_steps: int = 0
    """Updates made, skipped ones not counted."""
    skipped: list[int] = field(default_factory=list[int])
    """Steps that updated nothing, by number."""
    nonfinite_in_a_row: int = 0
    """Skipped steps since the last update, those left out by which fp16 found a lower loss scale."""
    losses: list[float] = field(default_factory=list[float])
    """The last losses, for whoever judges the next."""
    engine: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the engine keeps beside slices (a loss scale)."""

    def after(self, loss: float | None, skipped: bool, optimizer_steps: int, searching: bool = False) -> "TrainState":
        """The state behind the next step; `searching`: it was skipped for a loss scale that has room to fall."""
        step = self.step + 1
        return replace(
            self,
            step=step,
            optimizer_steps=optimizer_steps,
            skipped=[*self.skipped, step] if skipped else self.skipped,
            nonfinite_in_a_row=self.nonfinite_in_a_row + (not searching) if skipped else 0,
            losses=self.losses if loss is None else [*self.losses, loss][-_LOSS_HISTORY:],
        )

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    def resumed(self, saved: Mapping[str, Any], where: str) -> "TrainState":
        """`saved` (a checkpoint's state) continued under this run's settings. Raises CheckpointError where they differ."""
        if saved.get("format") != FORMAT:
            raise CheckpointError(Problem(where, f"state format {saved.get('format')!r}", f"{FORMAT}"))
        for name in ("prepared_fingerprint", "seed", "global_batch_size"):
            if name not in saved:
                raise CheckpointError(Problem(where, f"{name} is missing"))
            if saved[name] != self.__dict__[name]:
                problem = Problem(
                    where,
                    f"{name} was {saved[name]!r} and is now {self.__dict__[name]!r}",
                    "the same data order",
                    do="start a new run for other data, seed or batch size",
                )
                raise CheckpointError(problem)
        if saved.get("frozen", "") != self.frozen:
            problem = Problem(
                where,
                "the weights that `train.freeze` leaves as they are differ from those that the run began with",
                do="give `model.path` the files that it had when the run began",
            )
            raise CheckpointError(problem)
        known = {f.name: saved[f.name] for f in fields(self) if f.name in saved}
        return TrainState(**{**known, "total_steps": self.total_steps})
