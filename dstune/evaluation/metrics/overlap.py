"""BLEU, chrF and ROUGE: overlap of n-grams and subsequences, by sacrebleu and rouge_score."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from dstune.evaluation.metrics.base import RowMetric
from dstune.evaluation.text import bleu_tokenizer, words


class Bleu(RowMetric):
    """Corpus BLEU as sacrebleu computes it (Post 2018), 0 to 100; one example's own figure uses the effective order."""

    text = "corpus BLEU, 0 to 100"

    def __init__(self, tokenize: str = "auto", lowercase: bool = False) -> None:
        super().__init__()
        self._tokenize = tokenize
        self._lowercase = lowercase
        self._bleu = BLEU(tokenize=None if tokenize == "auto" else tokenize, lowercase=lowercase)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Any:
        if self._tokenize == "auto":
            self._bleu = BLEU(tokenize=bleu_tokenizer(references), lowercase=self._lowercase)
        # The per-segment counts that sacrebleu's own bootstrap resamples; a test holds their sum to `corpus_score`.
        return self._bleu._extract_corpus_statistics(list(predictions), [list(references)])  # pyright: ignore[reportPrivateUsage]

    def finish(self, total: np.ndarray) -> dict[str, float]:
        return {"bleu": self._score(total, effective_order=False)}

    def example(self, row: np.ndarray) -> dict[str, float]:
        return {"bleu": self._score(row, effective_order=True)}

    def _score(self, total: np.ndarray, effective_order: bool) -> float:
        counts = [int(number) for number in total]
        order = (len(counts) - 2) // 2
        score = BLEU.compute_bleu(
            correct=counts[2 : 2 + order],
            total=counts[2 + order :],
            sys_len=counts[0],
            ref_len=counts[1],
            smooth_method="exp",
            effective_order=effective_order,
        )
        return float(score.score)

    def details(self) -> dict[str, Any]:
        return {"signature": str(self._bleu.get_signature())}


class Chrf(RowMetric):
    """Corpus chrF (Popović 2015), 0 to 100; `word_order: 2` is chrF++."""

    text = "corpus chrF, 0 to 100"

    def __init__(self, word_order: int = 0) -> None:
        super().__init__()
        self._figure = "chrf" + "+" * word_order
        self._chrf = CHRF(word_order=word_order)

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> Any:
        return self._chrf._extract_corpus_statistics(list(predictions), [list(references)])  # pyright: ignore[reportPrivateUsage]

    def finish(self, total: np.ndarray) -> dict[str, float]:
        counts = [int(number) for number in total]
        return {self._figure: float(self._chrf._compute_score_from_stats(counts).score)}  # pyright: ignore[reportPrivateUsage]

    def details(self) -> dict[str, Any]:
        return {"signature": str(self._chrf.get_signature())}


class _Words(Tokenizer):
    """rouge_score's own tokenizer drops every character that is not a-z or 0-9: Chinese text would score 0."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


class Rouge(RowMetric):
    """ROUGE-1, -2, -L and -Lsum F-measures (Lin 2004), means over examples, 0 to 1. English: rouge_score's own figures."""

    text = "mean ROUGE F-measures, 0 to 1"
    types = ("rouge1", "rouge2", "rougeL", "rougeLsum")

    def __init__(self, stem: bool = False) -> None:
        super().__init__()
        # With stemming rouge_score's own tokenizer is used: Porter's stems are English ones.
        self._scorer = RougeScorer(list(self.types), use_stemmer=stem, tokenizer=None if stem else _Words())

    def statistics(self, predictions: Sequence[str], references: Sequence[str]) -> list[list[float]]:
        made = (self._scorer.score(r, p) for p, r in zip(predictions, references, strict=True))
        return [[*(scores[name].fmeasure for name in self.types), 1.0] for scores in made]

    def finish(self, total: np.ndarray) -> dict[str, float]:
        return {name: float(total[index] / total[-1]) for index, name in enumerate(self.types)}
