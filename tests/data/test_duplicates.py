import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from dstune.config.schema import DeduplicateSection
from dstune.data.conversation import Conversation, Message
from dstune.data.duplicates import as_digests, find_duplicates, rows_per_band, sketch, sketches

NEAR = DeduplicateSection()
EXACT = DeduplicateSection(method="exact")


def chat(question, answer, system=None, tools=()):
    before = [Message("system", system)] if system else []
    return Conversation((*before, Message("user", question), Message("assistant", answer)), tools)


def numbered(first, count, step=1):
    return " ".join(f"word{number}" for number in range(first, first + count * step, step))


def found(conversations, settings=NEAR):
    made = sketches(conversations, settings)
    signatures = None if settings.method == "exact" else np.stack([one.signature for one in made])
    return find_duplicates(as_digests(b"".join(one.exact for one in made)), signatures, settings)


def test_case_and_blanks_do_not_make_another_conversation():
    same = [chat("What is  it?\n", "A cat."), chat("what is it?", "a\tcat. "), chat("What is it?", "A dog.")]
    result = found(same, EXACT)
    assert result.kept.tolist() == [True, False, True]
    assert result.of.tolist() == [-1, 0, -1]
    assert result.similarity.tolist() == [0, 1, 0]


def test_exact_repetitions_compare_every_turn_and_who_says_it():
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    base = chat("a", "b")
    others = [
        base,
        chat("a b", ""),
        Conversation((Message("user", "b"), Message("assistant", "a"))),
        chat("a", "b", system="c"),
        Conversation((Message("user", "a"), Message("assistant", "b", tool_calls=(call,)))),
        Conversation((Message("user", "a"), Message("assistant", "b", reasoning="c"))),
        chat("a", "b", tools=({"name": "f"},)),
    ]
    assert len({sketch(one, EXACT).exact for one in others}) == len(others)


def test_the_order_of_keys_and_of_tools_does_not_count():
    one = ({"name": "f", "description": "d"}, {"name": "g"})
    other = ({"name": "g"}, {"description": "d", "name": "f"})
    assert sketch(chat("a", "b", tools=one), EXACT) == sketch(chat("a", "b", tools=other), EXACT)


def test_the_first_of_nearly_equal_conversations_stays():
    text = numbered(0, 200)
    edited = text.replace("word100 ", "changed ")
    result = found([chat("other", numbered(900, 200)), chat("Say it.", text), chat("Say it.", edited)])
    assert result.of.tolist() == [-1, -1, 1]
    assert 0.9 < result.similarity[2] < 1


@pytest.mark.parametrize("kept_words", [120, 160, 190])
def test_the_estimate_is_near_the_real_similarity(kept_words):
    """Within four standard errors of the Jaccard similarity of the sets of n-grams."""
    one, other = numbered(0, 200), numbered(0, kept_words) + " " + numbered(1000, 200 - kept_words)
    first, second = sketches([chat("", one), chat("", other)], DeduplicateSection(ngram=1))
    real = kept_words / (400 - kept_words)
    estimate = (first.signature[:128] == second.signature[:128]).mean()
    assert abs(estimate - real) < 4 * np.sqrt(real * (1 - real) / 128)


def test_only_exact_repetitions_are_wholly_alike():
    text = numbered(0, 50)
    result = found([chat("a", text), chat("a", text + "!"), chat("A", text), chat("a", text + "!")])
    assert result.of.tolist() == [-1, 0, 0, 0]
    assert result.similarity[2] == 1
    assert 0.99 < result.similarity[1] < 1 and 0.99 < result.similarity[3] < 1


def test_other_questions_on_one_passage_are_no_duplicates():
    passage = numbered(0, 400)
    asked = [
        chat(f"{passage}\nWho came {when}?", f"It was {who} who came.") for when, who in (("first", "A"), ("last", "B"))
    ]
    assert found(asked).kept.all()


@pytest.mark.parametrize("by", ["conversation", "prompt"])
def test_other_questions_with_the_same_answer_are_no_duplicates(by):
    passage = numbered(0, 400)
    asked = [
        chat(f"{passage}\n{question}", "Yes.")
        for question in ("Did the king die in war?", "Has anyone seen that ship?")
    ]
    assert found(asked, DeduplicateSection(by=by)).kept.all()
    same = [chat(f"{passage}\n{how}: Did the king die in war?", "Yes.") for how in ("Answer", "Question")]
    assert found(same, DeduplicateSection(by=by)).kept.tolist() == [True, False]


def test_a_shared_system_text_with_short_turns_is_no_duplicate():
    system = numbered(0, 300)
    assert found([chat("Hi", "Hello!", system), chat("Bye", "See you!", system)]).kept.all()
    assert found([chat("Light on.", "Done.", system), chat("Turn the heating down", "Done.", system)]).kept.all()


def test_a_source_with_its_own_system_text_repeats_another_nearly():
    one, other = chat("Why is it?", numbered(0, 60)), chat("Why is it?", numbered(0, 60), numbered(500, 100))
    assert found([one, other]).kept.tolist() == [True, False]
    assert found([one, other], EXACT).kept.all()
    assert found([one, other], DeduplicateSection(by="prompt")).kept.all()


def test_conversations_with_other_tools_are_never_alike():
    text = numbered(0, 100)
    tools = [({"name": name},) for name in "fg"]
    assert found([chat("a", text, tools=of) for of in tools]).kept.all()


def test_prompts_alone_are_compared_on_request():
    pair = [chat("What is the capital of France?", "Paris."), chat("what is the capital of france", "It is Lyon.")]
    assert found(pair, DeduplicateSection(by="prompt")).kept.tolist() == [True, False]
    assert found(pair).kept.all()


def test_documents_are_compared_whole_even_where_prompts_are():
    documents = [Conversation((Message("document", numbered(at, 50)),), document=True) for at in (0, 100, 0)]
    for method in ("exact", "near"):
        assert found(documents, DeduplicateSection(by="prompt", method=method)).kept.tolist() == [True, True, False]
        assert found(documents, DeduplicateSection(method=method)).kept.tolist() == [True, True, False]


def test_chinese_is_compared_by_characters():
    text = "".join(chr(code) for code in range(0x4E00, 0x4EC8))
    edited = text.replace(chr(0x4E40), "猫")
    result = found([chat("什么是机器学习？", text), chat("什么是机器学习？", edited), chat("你好吗？", "我很好。")])
    assert result.kept.tolist() == [True, False, True]


def test_texts_without_words_are_told_apart():
    assert found([chat("?", "!"), chat("😀", "..."), chat("", "")]).kept.all()


def test_every_dropped_example_is_like_the_kept_one_that_it_names():
    """A chain, each like its neighbours and unlike those further away: dropping by neighbourhood alone would leave one."""
    chain = [chat("Go on.", numbered(start, 200)) for start in range(0, 200, 10)]
    result = found(chain)
    made = [one.signature[:128] for one in sketches(chain, NEAR)]
    dropped = np.flatnonzero(~result.kept)
    assert 2 < result.kept.sum() < len(chain)
    for number in dropped:
        root = result.of[number]
        assert result.kept[root] and root < number
        assert (made[number] == made[root]).mean() == pytest.approx(result.similarity[number])
        assert result.similarity[number] >= NEAR.threshold


def test_alike_pairs_are_found_among_many_others():
    random = np.random.default_rng(0)
    signatures = random.integers(0, 2**32, (20_000, 160), dtype=np.uint32)
    copies, originals = np.arange(15_000, 20_000), np.arange(5_000)
    same = random.random((5_000, 160)) < 0.93
    signatures[copies] = np.where(same, signatures[originals], signatures[copies])
    digests = random.integers(0, 2**63, (20_000, 2)).astype(np.uint64)
    result = find_duplicates(digests, signatures, NEAR)
    assert result.kept[:15_000].all()
    assert (result.of[copies] == originals).mean() > 0.99


def test_bands_miss_fewer_than_one_in_a_hundred_at_the_threshold():
    for threshold in (0.5, 0.7, 0.8, 0.9, 0.95, 1.0):
        rows = rows_per_band(128, threshold)
        assert (1 - threshold**rows) ** (128 // rows) <= 0.01


def test_the_sketch_is_the_same_in_another_process_alone_or_in_a_chunk():
    one, other = chat("Was ist das? 这是什么？", numbered(0, 40)), chat("x", "y")
    here = sketch(one, NEAR)
    program = (
        "import sys, json\n"
        "from dstune.config.schema import DeduplicateSection\n"
        "from dstune.data.conversation import Conversation, Message\n"
        "from dstune.data.duplicates import sketch\n"
        "turns = tuple(Message(*turn) for turn in json.load(sys.stdin))\n"
        "made = sketch(Conversation(turns), DeduplicateSection())\n"
        "print(made.exact.hex(), made.signature.tobytes().hex())"
    )
    turns = json.dumps([(turn.role, turn.content) for turn in one.messages])
    there = subprocess.run(
        [sys.executable, "-c", program], input=turns, capture_output=True, text=True, check=True
    ).stdout.split()
    assert there == [here.exact.hex(), here.signature.tobytes().hex()]
    assert np.array_equal(sketches([other, one, other], NEAR)[1].signature, here.signature)
    assert np.array_equal(pickle.loads(pickle.dumps(here)).signature, here.signature)


def test_the_sketch_of_a_text_never_changes():
    """Golden: what a prepared directory holds is a function of its inputs, whatever the machine and the package's version."""
    made = sketch(chat("The quick brown fox jumps over the lazy dog.", "敏捷的棕色狐狸"), NEAR)
    assert (made.exact.hex(), made.signature[[0, 1, 127, 128, 159]].tolist()) == GOLDEN


GOLDEN = ("5f2201731b02aed90791fe3828f69d19", [2280700468, 2330870472, 3102989834, 1229996916, 3457533130])


def test_nothing_at_all():
    empty = np.zeros((0, 2), np.uint64)
    assert not len(find_duplicates(empty, np.zeros((0, 160), np.uint32), NEAR).kept)
    assert not len(find_duplicates(empty, None, EXACT).of)


@pytest.mark.shared
def test_real_repetitions_between_two_files(shared_data):
    """LLaMA-Factory's v1 demo repeats alpaca rows: the copies go, the originals stay."""
    rows = json.loads((shared_data / "llama_factory/alpaca_en_demo.json").read_text())[:200]
    originals = [chat(f"{row['instruction']}\n{row['input']}".strip(), row["output"]) for row in rows]
    copies = [
        replace(one, messages=(one.messages[0], replace(one.messages[1], content=one.messages[1].content + "\n")))
        for one in originals
    ]
    result = found([*originals, *copies])
    assert not result.kept[len(originals) :].any()
    assert result.kept[: len(originals)].sum() >= 195
