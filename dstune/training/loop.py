"""The training loop: one worker's way from the first step it must take to the last, in agreement with all others."""

import math
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Protocol

import numpy as np
import torch

from dstune.batch import Batch, Collator, Share
from dstune.config.schema import RunConfig
from dstune.data import order
from dstune.data.shards import Prepared
from dstune.errors import DataError, Diverged, Problem
from dstune.loggers import get_logger
from dstune.planning.plan import Plan
from dstune.protocols import Control, Engine
from dstune.records.step import StepRecord
from dstune.training.cadence import SaveCadence
from dstune.training.phases import PhaseClock, Utilisation
from dstune.training.profiling import Trace
from dstune.training.schedule import learning_rate
from dstune.training.seeds import forward_seed
from dstune.training.state import TrainState
from dstune.training.validation import ValidationRecord, Validator

log = get_logger(__name__)

_PHASES = ("data", "forward", "backward", "optimizer")

Loss = Callable[[Any, Batch], torch.Tensor]
"""`loss(module, batch)`: the sum of the token losses over the batch's targets, fp32."""


class Books(Protocol):
    """Where worker 0 writes what happened, and reads whether to stop."""

    def step(self, record: StepRecord) -> None: ...
    def validation(self, record: ValidationRecord) -> None: ...
    def skip(self, step: int, examples: list[dict[str, Any]]) -> None: ...
    def stop_reason(self) -> str | None:
        """Why a stop was asked for; None: nobody asked."""
        ...


class Saver(Protocol):
    """Commits checkpoints, behind the training where it can. Raises CheckpointError on all workers where a save failed."""

    def save(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Begin to commit `state`, on all workers together; the one before is settled first."""
        ...

    def failed(self) -> bool:
        """Whether a save behind the training failed here and was not settled yet."""
        ...

    def settle(self) -> None:
        """Wait for the save that is under way, on all workers together."""
        ...


@dataclass(frozen=True)
class LoopEnd:
    """How the loop ended: every step done, or stopped early at an agreed, committed step."""

    state: str
    """`succeeded` or `stopped`."""
    step: int
    reason: str = ""


class Loop:
    """Trains from `state` to the plan's last step. A collective object: every worker drives one in lockstep."""

    def __init__(
        self,
        *,
        config: RunConfig,
        plan: Plan,
        engine: Engine,
        loss: Loss,
        prepared: Prepared,
        validator: Validator | None,
        control: Control,
        state: TrainState,
        saver: Saver,
        books: Books,
        device: torch.device,
        pad_id: int,
        utilisation: Utilisation | None = None,
        trace: Trace | None = None,
    ) -> None:
        self.config, self.plan, self.engine, self.loss = config, plan, engine, loss
        self.prepared, self.validator, self.control = prepared, validator, control
        self.state, self.saver, self.books = state, saver, books
        self.device, self.utilisation, self.trace = device, utilisation, trace
        self._share = Share.of(plan, control.rank)
        self._collated = Collator(prepared, plan.layout, pad_id, self._share, device)
        self._cadence = SaveCadence(config.checkpoint.every)
        self._saved_step = state.step
        self._checkpoint_seconds = 0.0
        self._metrics: dict[str, float] = {}
        self._measured_at = -1

    def run(self) -> LoopEnd:
        """Take every step that is left. Raises Diverged after too many non-finite steps in a row, and what the saver raises."""
        try:
            end = self._train()
        except Diverged:
            self.saver.settle()
            raise
        self.saver.settle()
        return end

    def _train(self) -> LoopEnd:
        if self.validator and self.state.step == 0:
            self._validate()
        while self.state.step < self.plan.total_steps:
            if self.trace is not None:
                self.trace.before(self.state.step + 1)
            reason, due = self._step()
            done = self.state.step == self.plan.total_steps
            if self.trace is not None:
                self.trace.after(self.state.step, end=done or reason is not None)
            judged = due and reason is None and self.config.checkpoint.best is not None  # a stop does not wait for it
            if self.validator and (done or judged or self.state.step % self.config.validate_.every == 0):
                self._validate()
            if due or done or reason is not None:
                self._commit()
            if reason is not None and not done:
                return LoopEnd("stopped", self.state.step, reason)
        return LoopEnd("succeeded", self.state.step)

    def _step(self) -> tuple[str | None, bool]:
        """One update; whether worker 0 was asked to stop, and whether a checkpoint is due."""
        started, communicated = time.monotonic(), self.engine.communication_seconds()
        step, plan = self.state.step, self.plan
        rows = order.rows_of_step(
            plan.num_rows, self.config.train.seed, plan.global_batch_size, plan.total_positions, step
        )
        supervised = int(self.prepared.rows_supervised[rows].sum())
        scale = self._share.counted / supervised
        squares, clock, losses = 0, PhaseClock(self.device), list[torch.Tensor]()
        micro_batches = self._share.micro_batches(rows, plan.micro_batch_size)
        for number, micro in enumerate(micro_batches):
            with clock.phase("data"):
                batch = self._collated(micro)
            squares += sum(length * length for length in batch.lengths)
            torch.manual_seed(forward_seed(self.config.train.seed, step, micro[0], self._share.place))
            with clock.phase("forward"):
                loss_sum = self.loss(self.engine.module, batch)
            with clock.phase("backward"):
                self.engine.backward(loss_sum * scale, last=number == len(micro_batches) - 1)
            losses.append(loss_sum.detach())  # to look at it now would be to wait for the GPU
        with clock.phase("optimizer"):
            result = self.engine.step(learning_rate(self.config.train, step, plan.total_steps))
        values = [float(loss) for loss in losses]
        total = reduce(add, values, 0.0)  # one by one: Python's own sum of floats is another one from 3.12 on
        bad = [micro for micro, value in zip(micro_batches, values, strict=True) if not math.isfinite(value)]
        nonfinite = [row for micro in bad for row in micro if row is not None]
        mine = {
            "loss": total * self._share.counts if math.isfinite(total) else None,
            "nonfinite": nonfinite,
            "seconds": clock.seconds(),
            "communication": self.engine.communication_seconds() - communicated,
            "ended": time.monotonic() - started,
            "squares": squares,
            "memory": _peak_memory_bytes(self.device),
            "stop": self.books.stop_reason() if self.control.rank == 0 else None,
            "due": self._cadence.due(step + 1),
            "unsaved": self.saver.failed(),
        }
        everyone = self.control.gather(mine)
        loss = _mean_loss(everyone, supervised)
        skipped = result.skipped or loss is None
        # fp16 finds its scale by overflowing: as long as the loss itself is finite, that is no step towards giving up.
        searching = result.scale_falls and loss is not None
        self.state = self.state.after(None if skipped else loss, skipped, self.engine.optimizer_steps, searching)
        record = self._record(rows, supervised, loss, result.grad_norm, everyone, started, skipped)
        if self.control.rank == 0:
            self.books.step(record)
        if skipped:
            suspects = sorted({row for one in everyone for row in one["nonfinite"]}) or [int(r) for r in rows]
            self._report_skip([] if searching else suspects)
        if any(one["unsaved"] for one in everyone):
            self.saver.settle()
        return everyone[0]["stop"], bool(everyone[0]["due"])

    def _record(
        self,
        rows: np.ndarray,
        supervised: int,
        loss: float | None,
        grad_norm: float,
        everyone: list[dict[str, Any]],
        started: float,
        skipped: bool,
    ) -> StepRecord:
        seconds = time.monotonic() - started
        tokens = int(self.prepared.rows_tokens[rows].sum())
        checkpoint_seconds, self._checkpoint_seconds = self._checkpoint_seconds, 0.0
        position = min(self.state.step * self.plan.global_batch_size, self.plan.total_positions)
        return StepRecord(
            step=self.state.step,
            epoch=round(position / self.plan.num_rows, 6),
            loss=loss,
            grad_norm=grad_norm if math.isfinite(grad_norm) else None,
            lr=learning_rate(self.config.train, self.state.step - 1, self.plan.total_steps),
            tokens=tokens,
            supervised_tokens=supervised,
            rows=len(rows),
            batch_digest=order.digest(np.concatenate([self.prepared.row(int(row)) for row in rows])),
            step_seconds=round(seconds, 6),
            **{f"{name}_seconds": round(max(one["seconds"][name] for one in everyone), 6) for name in _PHASES},
            communication_seconds=round(max(one["communication"] for one in everyone), 6),
            waiting_seconds=round(seconds - min(one["ended"] for one in everyone), 6),
            checkpoint_seconds=round(checkpoint_seconds, 6),
            tokens_per_second=round(tokens / seconds, 3),
            supervised_tokens_per_second=round(supervised / seconds, 3),
            mfu=self._mfu(tokens, sum(one["squares"] for one in everyone) // self.plan.group, seconds),
            peak_memory_bytes=max(one["memory"] for one in everyone),
            world=self.control.world_size,
            attempt=self.plan.attempt,
            skipped=skipped,
        )

    def _mfu(self, tokens: int, squares: int, seconds: float) -> float | None:
        if self.utilisation is None:
            return None
        return round(self.utilisation.mfu(tokens, squares, seconds, self.control.world_size), 4)

    def _report_skip(self, rows: list[int]) -> None:
        """Count a step that updated nothing, and name what it saw in `rows` (none: its loss scale was too high).

        Give up after too many in a row.
        """
        examples = [self._name(int(number)) for row in rows for number in self.prepared.row(row)]
        if self.control.rank == 0:
            self.books.skip(self.state.step, examples)
        limit = self.config.train.nonfinite_limit
        log.warning("step %d skipped: loss or gradient not finite (%d in a row)", *_skip_facts(self.state))
        if self.state.nonfinite_in_a_row >= limit:
            raise Diverged(
                Problem(
                    f"step {self.state.step}",
                    f"{limit} steps in a row had a loss or a gradient that is not finite",
                    do="the examples are in events.jsonl; a lower train.lr or bf16 in place of fp16 often helps",
                )
            )

    def _name(self, number: int) -> dict[str, Any]:
        example = self.prepared.example(number)
        source = self.prepared.manifest["sources"][example.source]["path"]
        return {"example": number, "source": source, "line": example.line, "part": example.part}

    def _validate(self) -> None:
        assert self.validator is not None
        record = self.validator.run(self.state.step)
        self._metrics = {"loss": record.loss}
        self._measured_at = self.state.step
        if self.control.rank == 0:
            self.books.validation(record)

    def _commit(self) -> None:
        if self._saved_step == self.state.step:
            return
        started = time.perf_counter()
        self.saver.save(self.state, self._metrics if self._measured_at == self.state.step else {})
        self._saved_step = self.state.step
        self._checkpoint_seconds += time.perf_counter() - started
        self._cadence.saved()


def require_targets(prepared: Prepared) -> None:
    """Every row must hold a target, or a step could have none to take a mean over. Raises DataError."""
    empty = np.flatnonzero(np.asarray(prepared.rows_supervised) == 0)
    if len(empty):
        raise DataError(Problem(str(prepared.root), f"row {empty[0]} has no supervised token", "at least one in each"))


def _skip_facts(state: TrainState) -> tuple[int, int]:
    return state.step, state.nonfinite_in_a_row


def _mean_loss(everyone: list[dict[str, Any]], supervised: int) -> float | None:
    """Mean over the global batch's supervised tokens, summed in rank order; None where a part is not finite."""
    parts = [one["loss"] for one in everyone]
    if any(part is None for part in parts):
        return None
    return math.fsum(parts) / supervised


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
