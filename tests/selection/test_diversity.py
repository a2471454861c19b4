"""k-center over TF-IDF: against the same thing done plainly, and what it is for."""

import numpy as np
import pytest

from dstune.selection.diversity import Index, candidates, k_center


def told(stage, done):
    pass


WORDS = ["river", "star", "cat", "soup", "train", "poem", "bond", "atom", "sea", "hat"]


def some_texts(count, seed=0):
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(1, 8))) + " the same end" for _ in range(count)]


def plain_vectors(texts):
    """TF-IDF as the docstring writes it, dense and by dictionaries."""
    having = {}
    for text in texts:
        for word in set(text.split()):
            having[word] = having.get(word, 0) + 1
    names = sorted(having)
    vectors = np.zeros((len(texts), len(names)))
    for row, text in enumerate(texts):
        for column, word in enumerate(names):
            if times := text.split().count(word):
                vectors[row, column] = (1 + np.log(times)) * np.log((1 + len(texts)) / (1 + having[word]))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_similarities_are_those_of_plain_vectors():
    texts = some_texts(40)
    vectors = plain_vectors(texts)
    index = Index.of(texts, len(texts))
    for text in (0, 7, 39):
        assert index.similarities(text) == pytest.approx(vectors @ vectors[text], abs=1e-6)


def test_the_picks_are_those_of_plain_k_center():
    texts = some_texts(60, seed=3)
    lengths = np.random.default_rng(5).integers(1, 50, len(texts))
    vectors = plain_vectors(texts)
    similarity = np.zeros(len(texts))
    picks = []
    for _ in range(15):
        bands = np.floor(np.sqrt(np.clip(1 - similarity, 0, 1)) / 0.05 + 1e-9)
        left = [n for n in range(len(texts)) if n not in picks]
        pick = max(left, key=lambda n: (bands[n], lengths[n], -n))
        picks.append(pick)
        similarity = np.maximum(similarity, vectors @ vectors[pick])
    found = k_center(Index.of(texts, len(texts)), lengths, 15, told)
    assert found.picks.tolist() == picks
    assert sorted([*found.picks, *found.others]) == list(range(60))
    assert found.distance[found.others] == pytest.approx(np.sqrt(np.clip(1 - similarity[found.others], 0, 1)), abs=1e-3)
    assert all(vectors[n] @ vectors[found.nearest[n]] == pytest.approx(similarity[n], abs=1e-6) for n in found.others)


def test_every_topic_is_taken_once_before_any_twice():
    texts = [f"{topic} {WORDS[n % 10]}" for topic in ("whale", "comet", "piano") for n in range(10)]
    lengths = np.ones(30, dtype=int)
    lengths[[4, 17, 25]] = 9
    found = k_center(Index.of(texts, 30), lengths, 3, told)
    assert sorted(n // 10 for n in found.picks) == [0, 1, 2]
    assert found.picks[0] == 4


def test_texts_without_words_and_repeated_ones_are_one_place():
    texts = ["!!!", "", "alpha beta", "alpha beta", "gamma delta", "gamma delta", "..."]
    found = k_center(Index.of(texts, 7), np.array([1, 2, 3, 4, 5, 6, 7]), 3, told)
    assert sorted(found.picks.tolist()) == [3, 5, 6]
    assert found.distance[found.others].tolist() == [0, 0, 0, 0]
    everything = k_center(Index.of(texts, 7), np.ones(7, dtype=int), 7, told)
    assert sorted(everything.picks.tolist()) == list(range(7)) and len(everything.others) == 0


def test_scripts_without_blanks_have_words():
    texts = ["介绍一下河流", "介绍一下河流吧", "解方程的方法"]
    index = Index.of(texts, 3)
    assert index.similarities(0)[1] > 0.5 > index.similarities(0)[2]


def test_of_very_many_only_some_are_compared(monkeypatch):
    monkeypatch.setattr("dstune.selection.diversity.MAX_CANDIDATES", 100)
    few = candidates(1000, 10, seed=1)
    assert len(few) == 100 == len(set(few)) and (np.diff(few) > 0).all() and few.max() < 1000
    assert few.tolist() != candidates(1000, 10, seed=2).tolist()
    assert len(candidates(1000, 80, seed=1)) == 160
    assert candidates(90, 10, seed=1).tolist() == list(range(90))
