"""The metrics, as `evaluate.Metric`s that live here: nothing is fetched to score."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from dstune.evaluation.metrics.base import RowMetric
from dstune.evaluation.metrics.classification import F1, Accuracy, LabelMetric, Precision, Recall
from dstune.evaluation.metrics.matching import ExactMatch, TokenF1
from dstune.evaluation.metrics.overlap import Bleu, Chrf, Rouge
from dstune.evaluation.metrics.perplexity import Perplexity

if TYPE_CHECKING:
    from dstune.evaluation.tasks import MetricSpec, Task

COMPARED = frozenset({"exact_match", "accuracy", "precision", "recall", "f1", "token_f1"})
"""Metrics that see normalised texts; the others see the answer as it was written."""

__all__ = [
    "COMPARED",
    "F1",
    "Accuracy",
    "Bleu",
    "Chrf",
    "ExactMatch",
    "Perplexity",
    "Precision",
    "Recall",
    "Rouge",
    "RowMetric",
    "TokenF1",
    "build",
]


def build(spec: "MetricSpec", task: "Task") -> RowMetric:
    """The metric that a task asks for, with its settings."""
    options = spec.options.model_dump()
    labels = task.normalised_labels()
    by_labels: dict[str, type[LabelMetric]] = {"precision": Precision, "recall": Recall, "f1": F1}
    if spec.name in by_labels:
        positive = options["positive"]
        return by_labels[spec.name](labels, options["average"], None if positive is None else task.normalised(positive))
    if spec.name == "accuracy":
        return Accuracy(labels)
    made: dict[str, Callable[..., RowMetric]] = {
        "exact_match": ExactMatch,
        "token_f1": TokenF1,
        "bleu": Bleu,
        "chrf": Chrf,
        "rouge": Rouge,
        "perplexity": Perplexity,
    }
    return made[spec.name](**options)
