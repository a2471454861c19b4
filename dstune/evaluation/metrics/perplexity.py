"""How likely the references are to the model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from dstune.evaluation.metrics.base import RowMetric

_OVERFLOW = 700.0


class Perplexity(RowMetric):
    """exp of the mean negative log-likelihood over all reference tokens (the end of turn among them), each token once.

    `predictions` are each reference's summed negative log-likelihood in nats, `references` its number of tokens.
    """

    text = "perplexity per reference token, from 1"
    columns: Mapping[str, Any] = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}

    def statistics(self, predictions: Sequence[float], references: Sequence[int]) -> list[list[float]]:
        return [[nll, tokens] for nll, tokens in zip(predictions, references, strict=True)]

    def finish(self, total: np.ndarray) -> dict[str, float]:
        nats = float(total[0] / total[1])
        return {"perplexity": math.exp(min(nats, _OVERFLOW)), "nats_per_token": nats}

    def details(self) -> dict[str, Any]:
        return {"tokens": int(self.rows[:, 1].sum())}
