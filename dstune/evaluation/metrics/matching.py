"""Answers compared as whole texts or by their common words."""

from collections import Counter

from dstune.evaluation.metrics.base import MeanMetric
from dstune.evaluation.text import squad_tokens


class ExactMatch(MeanMetric):
    """1 where the normalised answer equals the normalised reference, else 0."""

    figure = "exact_match"
    text = "share of answers equal to the reference, 0 to 1"
    shares = True

    def one(self, prediction: str, reference: str) -> float:
        return float(prediction == reference)


class TokenF1(MeanMetric):
    """SQuAD's F1 (Rajpurkar et al. 2016): the harmonic mean of token precision and recall, averaged over examples.

    Two empty texts agree (1); an empty one and a full one do not (0).
    """

    figure = "token_f1"
    text = "mean overlap of answer and reference tokens, 0 to 1"

    def one(self, prediction: str, reference: str) -> float:
        said, wanted = squad_tokens(prediction), squad_tokens(reference)
        if not said or not wanted:
            return float(said == wanted)
        common = (Counter(said) & Counter(wanted)).total()
        return 2 * common / (len(said) + len(wanted))
