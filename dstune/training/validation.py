"""Loss on held-out rows: the same rows in the same order every time, shared between the workers."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dstune.batch import Batch, Collator, Share
from dstune.data.shards import Prepared
from dstune.planning.plan import Layout
from dstune.protocols import Control


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """A line of evaluations.jsonl."""

    step: int
    loss: float
    """Mean over the held-out rows' supervised tokens; infinite or NaN values are stored as null."""
    perplexity: float
    supervised_tokens: int
    rows: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class Validator:
    """Evaluates `module` on (the first `max_rows` of) a prepared validation set. A collective object."""

    def __init__(
        self,
        *,
        module: Any,
        loss: Callable[[Any, Batch], torch.Tensor],
        prepared: Prepared,
        max_rows: int | None,
        micro_batch_size: int,
        layout: Layout,
        pad_id: int,
        control: Control,
        device: torch.device,
        share: Share | None = None,
    ) -> None:
        """`share`: what this worker does of them; None: its part of as many as there are workers."""
        self.module, self.loss, self.prepared = module, loss, prepared
        self.rows = np.arange(min(prepared.num_rows, max_rows or prepared.num_rows))
        self.micro_batch_size, self.control = micro_batch_size, control
        self.share = share or Share(control.rank, control.world_size)
        self._collated = Collator(prepared, layout, pad_id, self.share, device)

    def run(self, step: int) -> ValidationRecord:
        """The loss behind `step`."""
        started = time.perf_counter()
        self.module.eval()
        total = 0.0
        with torch.no_grad():
            for micro in self.share.micro_batches(self.rows, self.micro_batch_size):
                total += float(self.loss(self.module, self._collated(micro)))
        self.module.train()
        supervised = int(self.prepared.rows_supervised[self.rows].sum())
        parts = self.control.gather(total * self.share.counts if math.isfinite(total) else None)
        loss = math.nan if None in parts else math.fsum(part for part in parts if part is not None) / supervised
        return ValidationRecord(
            step=step,
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.nan,
            supervised_tokens=supervised,
            rows=len(self.rows),
            seconds=round(time.perf_counter() - started, 6),
        )
