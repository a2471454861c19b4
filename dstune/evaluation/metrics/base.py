"""What every metric here is: an `evaluate.Metric` whose value comes from the sum of one row of statistics per example.

So one definition gives the corpus figure, each example's own figure, and, by resampling the rows, its interval.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from dstune.evaluation.intervals import bootstrap, wilson
from dstune.paths import cache_directory
from dstune.records.evaluation import Estimate

_TEXTS = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}


class RowMetric(evaluate.Metric):
    """A metric made of per-example rows; `compute(predictions=..., references=...)` leaves them in `rows`."""

    text = ""
    """One line on what it measures, and its scale."""
    columns: Mapping[str, Any] = _TEXTS
    shares = False
    """True where the value is a share of right answers: column 0 is 1 or 0, and the interval is Wilson's."""

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True, cache_dir=str(cache_directory() / "metrics"), seed=0)
        self.rows = np.zeros((0, 1))

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.text,
            citation="",
            inputs_description="predictions and references, one each per example",
            features=datasets.Features(dict(self.columns)),
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        assert not kwargs, kwargs
        self.rows = np.asarray(self.statistics(predictions, references), dtype=np.float64).reshape(len(predictions), -1)
        return dict(self.finish(self.rows.sum(axis=0)))

    @abstractmethod
    def statistics(self, predictions: Sequence[Any], references: Sequence[Any]) -> Any:
        """[n, k] numbers, a row per example."""

    @abstractmethod
    def finish(self, total: np.ndarray) -> Mapping[str, float]:
        """The named figures of a [k] sum of rows."""

    def example(self, row: np.ndarray) -> Mapping[str, float]:
        """The figures of one example alone; empty where one example has none."""
        return self.finish(row)

    def details(self) -> dict[str, Any]:
        """What else to report of the last `compute`: settings that decide the figure, counts."""
        return {}

    def estimates(self, values: Mapping[str, float]) -> dict[str, Estimate]:
        """The values of the last `compute` with their intervals over its examples."""
        n = len(self.rows)
        if self.shares:
            low, high = wilson(float(self.rows[:, 0].sum()), n)
            return {name: Estimate(value, low, high, "wilson", n) for name, value in values.items()}
        ranges = bootstrap(self.rows, self.finish)
        return {name: Estimate(value, *ranges[name], "bootstrap", n) for name, value in values.items()}


class MeanMetric(RowMetric):
    """The mean of one figure per example."""

    figure = ""

    @abstractmethod
    def one(self, prediction: str, reference: str) -> float: ...

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> list[list[float]]:
        return [[self.one(p, r), 1.0] for p, r in zip(predictions, references, strict=True)]

    def finish(self, total: np.ndarray) -> dict[str, float]:
        return {self.figure: float(total[0] / total[1])}
