import numpy as np
import pytest

from dstune.data import words as room
from dstune.data.words import ngrams, words


def listed(text):
    found = words([text])
    return [found.between(number, 1) for number in range(len(found.hashes))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, World! x_1 = 3.5", ["hello", "world", "x", "1", "3", "5"]),
        ("don't\tstop\n", ["don", "t", "stop"]),
        ("中文abc字。カナ", ["中", "文", "abc", "字", "カ", "ナ"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ไทย", ["ไ", "ท", "ย"]),
        ("\U00020000\U0001f600é", ["\U00020000", "é"]),
        ("İstanbul", ["i̇stanbul"]),
        ("?! … 😀", []),
        ("", []),
        ("\ud800 a", ["a"]),
    ],
)
def test_words_are_runs_of_letters_or_single_ideographs(text, expected):
    assert listed(text) == expected


def test_equal_words_have_equal_hashes_and_others_do_not():
    one, other = words(["The cat, the CAT"]), words(["cat the"])
    assert one.hashes[0] == one.hashes[2] == other.hashes[1]
    assert one.hashes[1] == one.hashes[3] == other.hashes[0]
    many = words([" ".join(f"{number:x}" for number in range(100_000))])
    assert len(np.unique(many.hashes)) == 100_000


def test_runs_depend_on_order_and_length_alone():
    text = words(["a b c a b c d"])
    pairs = ngrams(text.hashes, 2)
    assert pairs[0] == pairs[3] and pairs[1] == pairs[4] and pairs[0] != pairs[1]
    assert ngrams(words(["b a"]).hashes, 2)[0] != pairs[0]
    assert not len(ngrams(text.hashes, 8))


def test_texts_in_a_chunk_are_kept_apart():
    texts = ["one two three", "", "?", "four", "five six"]
    found = words(texts)
    assert np.diff(found.offsets).tolist() == [3, 0, 0, 1, 2]
    assert [found.text_of(word) for word in range(6)] == [0, 0, 0, 3, 4, 4]
    assert np.diff(found.run_offsets(2)).tolist() == [2, 0, 0, 0, 1]
    alone = [words([text]) for text in texts]
    assert np.array_equal(found.hashes, np.concatenate([one.hashes for one in alone]))
    assert np.array_equal(found.runs(2), np.concatenate([one.runs(2) for one in alone]))
    assert np.array_equal(found.wholes(), np.concatenate([one.wholes() for one in alone]))
    assert found.wholes()[1] == 0


def test_no_texts():
    assert not len(words([]).hashes)
    assert words([]).offsets.tolist() == [0]


def test_long_texts_are_looked_at_in_parts_without_a_trace(monkeypatch):
    texts = ["some words 和 characters " * 40, "x" * 300, "中" * 300, "end of it"]
    whole = words(texts)
    monkeypatch.setattr(room, "_CHARACTERS_AT_ONCE", 101)
    parts = words(texts[:1] + texts[2:])
    assert np.array_equal(parts.hashes, np.concatenate([whole.hashes[:160], whole.hashes[161:]]))
    assert parts.between(len(parts.hashes) - 3, 3) == "end of it"
    assert len(words(["x" * 300]).hashes) == 3


def test_hashes_never_change():
    """Golden: the same on every machine, for what was dropped must not depend on where."""
    found = words(["Hello, 世界"])
    assert [*found.hashes.tolist(), *ngrams(found.hashes, 3).tolist()] == GOLDEN


GOLDEN = [9728279284078645664, 6620157912976568020, 8776319729502821753, 13396749418867957248]
