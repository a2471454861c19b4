"""Each metric against figures worked out by hand or by the library that defines it."""

import math

import evaluate
import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from dstune.evaluation.metrics import (
    F1,
    Accuracy,
    Bleu,
    Chrf,
    ExactMatch,
    Perplexity,
    Precision,
    Recall,
    Rouge,
    RowMetric,
    TokenF1,
    build,
)
from dstune.evaluation.tasks import MetricSpec, Task
from dstune.evaluation.text import NORMALISERS

ENGLISH = (
    ["the cat sat on the mat", "He said: \"it's 3.5 km, isn't it?\"", "", "running dogs were running"],
    ["the cat is on the mat", 'He said "it is 3.5 km, isn\'t it?"', "nothing at all", "a dog was running there"],
)
CHINESE = (["北京是中国的首都。", "今天天气很好", "我不知道"], ["北京是中国首都。", "今天的天气非常好", "明天会下雨"])


def value_of(metric: RowMetric, predictions: list, references: list) -> dict[str, float]:
    return metric.compute(predictions=predictions, references=references)


def test_every_metric_of_a_tasks_file_is_an_evaluate_metric():
    for name in MetricSpec.model_fields:
        task = Task(name="t", data="d", metrics=[name], labels=["yes", "no"])
        metric = build(task.metrics[0], task)
        assert isinstance(metric, evaluate.Metric)
        assert metric.description


def test_exact_match_is_the_share_of_equal_texts():
    assert value_of(ExactMatch(), ["a", "b", "c", ""], ["a", "B", "c", ""]) == {"exact_match": 0.75}


def test_wilson_interval_by_hand():
    # 8 of 10: centre (0.8 + 3.8415/20) / 1.38415, half 1.96/1.38415 * sqrt(0.016 + 3.8415/400)
    metric = ExactMatch()
    values = value_of(metric, ["x"] * 10, ["x"] * 8 + ["y"] * 2)
    estimate = metric.estimates(values)["exact_match"]
    assert (estimate.n, estimate.interval) == (10, "wilson")
    assert estimate.low == pytest.approx(0.4902, abs=1e-4)
    assert estimate.high == pytest.approx(0.9433, abs=1e-4)
    every = ExactMatch()
    perfect = every.estimates(value_of(every, ["x"] * 5, ["x"] * 5))["exact_match"]
    assert perfect.high == pytest.approx(1.0) and perfect.low == pytest.approx(0.5655, abs=1e-4)


def test_token_f1_by_hand():
    # "a cat sat" and "a cat ran fast": 2 common, 2*2/(3+4); equal empties 1; one empty 0.
    values = value_of(TokenF1(), ["a cat sat", "", "", "x x y"], ["a cat ran fast", "", "z", "x y y"])
    assert values["token_f1"] == pytest.approx((4 / 7 + 1 + 0 + 4 / 6) / 4)


def test_token_f1_counts_chinese_characters():
    # 北京 and 北京市: 2 common characters, 2*2/(2+3).
    assert value_of(TokenF1(), ["北京"], ["北京市"])["token_f1"] == pytest.approx(0.8)


REFERENCES = ["a", "a", "a", "b", "b", "c", "c", "c"]
PREDICTIONS = ["a", "b", "?", "b", "a", "c", "c", "b"]
# right/claims/support: a 1/2/3, b 1/3/2, c 2/2/3
P = {"a": 1 / 2, "b": 1 / 3, "c": 1.0}
R = {"a": 1 / 3, "b": 1 / 2, "c": 2 / 3}
F = {"a": 2 / 5, "b": 2 / 5, "c": 4 / 5}


@pytest.mark.parametrize(("kind", "by_label"), [(Precision, P), (Recall, R), (F1, F)])
def test_label_metrics_by_hand(kind, by_label):
    def of(average: str, positive: str | None = None) -> float:
        metric = kind(["a", "b", "c"], average, positive)
        (value,) = value_of(metric, PREDICTIONS, REFERENCES).values()
        return value

    assert of("macro") == pytest.approx(sum(by_label.values()) / 3)
    assert of("weighted") == pytest.approx((3 * by_label["a"] + 2 * by_label["b"] + 3 * by_label["c"]) / 8)
    assert of("binary", "b") == pytest.approx(by_label["b"])
    # The unparsable answer is a wrong one: 4 of 8 are right, not 4 of 7.
    assert of("micro") == pytest.approx(4 / 8)


def test_unparsable_answers_are_reported_with_each_label():
    metric = F1(["a", "b", "c"])
    value_of(metric, PREDICTIONS, REFERENCES)
    details = metric.details()
    assert details["unparsable"] == 1
    assert details["labels"]["a"] == {"f1": pytest.approx(0.4), "right": 1, "claims": 2, "support": 3}
    accuracy = Accuracy(["a", "b", "c"])
    assert value_of(accuracy, PREDICTIONS, REFERENCES) == {"accuracy": 0.5}
    assert accuracy.details() == {"unparsable": 1}


def test_a_label_that_never_occurs_counts_zero_in_macro():
    assert value_of(F1(["a", "b"]), ["a", "a"], ["a", "a"]) == {"f1_macro": 0.5}


@pytest.mark.parametrize(("texts", "tokenize"), [(ENGLISH, "13a"), (CHINESE, "zh")])
def test_bleu_is_sacrebleus_own(texts, tokenize):
    metric = Bleu()
    expected = BLEU(tokenize=tokenize)
    assert value_of(metric, *texts)["bleu"] == pytest.approx(expected.corpus_score(texts[0], [texts[1]]).score)
    assert metric.details()["signature"] == str(expected.get_signature())
    assert f"tok:{tokenize}" in metric.details()["signature"]


def test_bleu_of_chinese_needs_its_tokenizer():
    assert value_of(Bleu("zh"), *CHINESE)["bleu"] > 10 > value_of(Bleu("13a"), *CHINESE)["bleu"]


def test_bleu_of_one_example_uses_the_effective_order():
    metric = Bleu()
    value_of(metric, ["two words"], ["two words"])
    assert metric.example(metric.rows[0])["bleu"] == pytest.approx(100)


@pytest.mark.parametrize("word_order", [0, 2])
@pytest.mark.parametrize("texts", [ENGLISH, CHINESE])
def test_chrf_is_sacrebleus_own(texts, word_order):
    (value,) = value_of(Chrf(word_order), *texts).values()
    assert value == pytest.approx(CHRF(word_order=word_order).corpus_score(texts[0], [texts[1]]).score)


@pytest.mark.parametrize("stem", [False, True])
def test_rouge_of_english_is_rouge_scores_own(stem):
    scorer = RougeScorer(list(Rouge.types), use_stemmer=stem)
    expected = [scorer.score(reference, prediction) for prediction, reference in zip(*ENGLISH, strict=True)]
    values = value_of(Rouge(stem), *ENGLISH)
    for name in Rouge.types:
        assert values[name] == pytest.approx(np.mean([scores[name].fmeasure for scores in expected]))


def test_rouge_of_chinese_counts_characters():
    # 8 of 8 characters among 9: precision 1, recall 8/9 for unigrams (the full stop is no token: 7 and 8).
    values = value_of(Rouge(), ["北京是中国首都。"], ["北京是中国的首都。"])
    assert values["rouge1"] == pytest.approx(2 * 7 / (7 + 8))
    assert values["rouge2"] == pytest.approx(2 * 5 / (6 + 7))
    assert values["rougeL"] == pytest.approx(2 * 7 / (7 + 8))


def test_perplexity_weighs_tokens_not_texts():
    # 1 token at 1 nat, 9 tokens at 2 nats each: exp(19/10), not the mean of two perplexities.
    metric = Perplexity()
    values = value_of(metric, [1.0, 18.0], [1, 9])
    assert values["perplexity"] == pytest.approx(math.exp(1.9))
    assert metric.example(metric.rows[1])["perplexity"] == pytest.approx(math.exp(2))


def test_bootstrap_interval_brackets_the_value_and_is_the_same_again():
    rng = np.random.default_rng(1)
    predictions = ["a b c d" if draw else "a x y z" for draw in rng.random(60) < 0.5]
    found = []
    for _ in range(2):
        metric = Bleu()
        values = value_of(metric, predictions, ["a b c d"] * 60)
        found.append(metric.estimates(values)["bleu"])
    assert found[0] == found[1]
    assert found[0].low < found[0].value < found[0].high
    assert found[0].interval == "bootstrap"


def test_bootstrap_of_a_mean_has_the_width_of_its_standard_error():
    metric = TokenF1()
    values = value_of(metric, ["a", "b"] * 100, ["a"] * 200)
    estimate = metric.estimates(values)["token_f1"]
    # A fair coin, 200 throws: half width 1.96 * 0.5 / sqrt(200) = 0.0693.
    assert (estimate.high - estimate.low) / 2 == pytest.approx(0.0693, abs=0.008)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("none", " A  b ", " A  b "),
        ("strip", " A  b\n", "A b"),
        ("lower", " STRASSE ", "strasse"),
        ("squad", " The  quick, brown fox! ", "quick brown fox"),
        ("squad", "北京。", "北京"),
        ("number", "$1,200.50", "1200.5"),
        ("number", "１２", "12"),
        ("number", "-0", "0"),
        ("number", "1e3", "1000"),
        ("number", "NaN", "NaN"),
        ("number", "about  ten", "about ten"),
    ],
)
def test_normalisers(name, text, expected):
    assert NORMALISERS[name](text) == expected
