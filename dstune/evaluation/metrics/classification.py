"""Answers that name one of a few labels. An answer that names none is wrong, and counted as unparsable.

Rows: right (0 or 1), unparsable (0 or 1), then for each label its true positives, claims (answers) and support (references).
Sums of these give every average; the names and formulas of scikit-learn's `precision_recall_fscore_support` with
`zero_division=0`. One difference: in the micro average an unparsable answer is a wrong claim (scikit-learn with `labels=` leaves
it out of the precision), so that micro precision, recall, F1 and accuracy are the same figure, as for any single-label task.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dstune.evaluation.metrics.base import MeanMetric, RowMetric


class Accuracy(MeanMetric):
    """The share of answers that name the reference's label; without labels, that equal the reference."""

    figure = "accuracy"
    text = "share of right answers, 0 to 1"
    shares = True

    def __init__(self, labels: Sequence[str] = ()) -> None:
        super().__init__()
        self._labels = frozenset(labels)
        self._unparsable = 0

    def one(self, prediction: str, reference: str) -> float:
        return float(prediction == reference)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> list[list[float]]:
        self._unparsable = sum(prediction not in self._labels for prediction in predictions)
        return super().statistics(predictions, references)

    def details(self) -> dict[str, Any]:
        return {"unparsable": self._unparsable} if self._labels else {}


class LabelMetric(RowMetric):
    """What precision, recall and F1 share: counts per label and their averages."""

    figure = ""
    text = "by labels, 0 to 1"

    def __init__(self, labels: Sequence[str], average: str = "macro", positive: str | None = None) -> None:
        super().__init__()
        self._labels = list(labels)
        self._average = average
        self._positive = self._labels.index(positive) if positive is not None else None
        self._name = f"{self.figure}_{average}"

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
        number = {label: index for index, label in enumerate(self._labels)}
        rows = np.zeros((len(predictions), 2 + 3 * len(number)))
        for row, prediction, reference in zip(rows, predictions, references, strict=True):
            said, wanted = number.get(prediction), number[reference]
            row[0] = said == wanted
            row[1] = said is None
            row[2 + 3 * wanted + 2] = 1
            if said is not None:
                row[2 + 3 * said] = said == wanted
                row[2 + 3 * said + 1] = 1
        return rows

    def finish(self, total: np.ndarray) -> dict[str, float]:
        table = self._table(total)
        values, support = self.of(table[:, 0], table[:, 1], table[:, 2]), table[:, 2]
        if self._positive is not None:
            return {self._name: float(values[self._positive])}
        if self._average == "micro":
            return {self._name: float(total[0] / max(support.sum(), 1))}
        if self._average == "weighted":
            return {self._name: float((values * support).sum() / max(support.sum(), 1))}
        return {self._name: float(values.mean())}

    def example(self, row: np.ndarray) -> Mapping[str, float]:
        return {}

    def details(self) -> dict[str, Any]:
        total = self.rows.sum(axis=0)
        table = self._table(total)
        values = self.of(table[:, 0], table[:, 1], table[:, 2])
        labels = {
            label: {self.figure: float(value), "right": int(right), "claims": int(claims), "support": int(support)}
            for label, value, (right, claims, support) in zip(self._labels, values, table, strict=True)
        }
        return {"unparsable": int(total[1]), "labels": labels}

    def of(self, right: np.ndarray, claims: np.ndarray, support: np.ndarray) -> np.ndarray:
        """The figure of each label, [labels] from [labels] counts."""
        raise AssertionError("LabelMetric is not a metric by itself")

    def _table(self, total: np.ndarray) -> np.ndarray:
        return total[2:].reshape(-1, 3)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above, dtype=np.float64), where=below > 0)


class Precision(LabelMetric):
    """Of the answers that claim a label, the share that is right."""

    figure = "precision"

    def of(self, right: np.ndarray, claims: np.ndarray, support: np.ndarray) -> np.ndarray:
        return _ratio(right, claims)


class Recall(LabelMetric):
    """Of the references with a label, the share that was found."""

    figure = "recall"

    def of(self, right: np.ndarray, claims: np.ndarray, support: np.ndarray) -> np.ndarray:
        return _ratio(right, support)


class F1(LabelMetric):
    """The harmonic mean of precision and recall of each label."""

    figure = "f1"

    def of(self, right: np.ndarray, claims: np.ndarray, support: np.ndarray) -> np.ndarray:
        return _ratio(2 * right, claims + support)
