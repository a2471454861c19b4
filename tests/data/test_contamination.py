import json
import pickle

import numpy as np
import pytest

from dstune.config.schema import DecontaminateSection, Source
from dstune.data.contamination import Contamination
from dstune.data.conversation import Conversation, Message, Refused
from dstune.errors import ConfigError, DataError

QUESTION = "Natalia sold clips to forty eight of her friends in April and then she sold half as many in May"
SHORT = "What mountain stands highest above the northern sea?"
CHINESE = "小明在四月份向他的四十八个朋友出售了回形针然后五月份出售的数量是四月份的一半请问一共多少"


def chat(*said, **more):
    roles = ("user", "assistant") * len(said)
    return Conversation(tuple(Message(role, text, **more) for role, text in zip(roles, said, strict=False)))


def built(tmp_path, records, ngram=13, **settings):
    file = tmp_path / "eval.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    against = [Source(path="eval.jsonl", **settings)] if settings else ["eval.jsonl"]
    return Contamination.build(DecontaminateSection(against=against, ngram=ngram), tmp_path, 1 << 20)


def test_a_shared_run_of_words_names_the_words_the_file_and_the_line(tmp_path):
    against = built(tmp_path, [{"question": "Something else."}, {"question": QUESTION, "answer": "72"}])
    refused = against.check(chat(f"Solve: {QUESTION.upper().replace(' ', ',  ')}!", "72"))
    assert refused is not None
    assert refused.reason == "contaminated"
    assert "natalia" in refused.detail and refused.detail.endswith("eval.jsonl:2")


def test_twelve_words_are_not_thirteen(tmp_path):
    against = built(tmp_path, [{"question": QUESTION}])
    start = QUESTION.split()
    assert against.check(chat(" ".join(start[:12]), "and so on")) is None
    assert against.check(chat(" ".join(start[:13]), "and so on")) is not None
    assert built(tmp_path, [{"question": QUESTION}], ngram=12).check(chat(" ".join(start[:12]), "")) is not None


def test_every_turn_reasoning_and_call_is_looked_at(tmp_path):
    against = built(tmp_path, [{"question": QUESTION}])
    call = {"type": "function", "function": {"name": "ask", "arguments": {"list": [{"q": QUESTION}]}}}
    for conversation in (
        chat("a", "b", "c", QUESTION),
        chat("a", reasoning=QUESTION),
        Conversation((Message("user", "a"), Message("assistant", "", tool_calls=(call,)))),
        Conversation((Message("system", QUESTION), Message("user", "a"), Message("assistant", "b"))),
    ):
        assert isinstance(against.check(conversation), Refused)


def test_short_evaluation_texts_are_looked_for_whole(tmp_path):
    against = built(tmp_path, [{"question": SHORT, "answer": "yes"}])
    assert against.check(chat(f"Tell me: {SHORT}", "Mount X.")) is not None
    assert against.check(chat(SHORT.replace("highest", "lowest"), "Mount X.")) is None
    assert against.described()[0]["unchecked"] == 0


def test_texts_that_say_nothing_are_counted_and_not_looked_for(tmp_path):
    against = built(
        tmp_path, [{"question": "How old are you?", "answer": "yes"}, {"n": "1 2 3 4 5 6 7 8 9 10 11 12 13 14"}]
    )
    assert against.check(chat("How old are you?", "yes")) is None
    assert against.check(chat("Count.", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15")) is None
    assert against.described()[0]["unchecked"] == 2


def test_chinese_runs_are_twice_as_long(tmp_path):
    against = built(tmp_path, [{"question": CHINESE}])
    assert against.check(chat(CHINESE[3:29], "72")) is not None
    assert against.check(chat(CHINESE[3:28], "72")) is None


def test_what_most_records_of_a_file_share_is_their_form(tmp_path):
    form = "Answer the following multiple choice question about medicine with the letter of the right option and nothing else"
    numbers = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
    records = [{"question": f"{form}: {QUESTION.replace('forty', number)}"} for number in numbers]
    few = built(tmp_path, records[:5])
    assert few.check(chat(form, "A")) is not None
    against = built(tmp_path, [*records, {"question": CHINESE}])
    assert against.check(chat(form, "A")) is None


def test_columns_choose_what_is_looked_at(tmp_path):
    record = {
        "question": QUESTION,
        "source": "Written by a teacher of mathematics for the use of schools in the city of Paris in 1990",
    }
    conversation = chat(record["source"], "b")
    assert built(tmp_path, [record]).check(conversation) is not None
    assert built(tmp_path, [record], columns={"prompt": "question"}).check(conversation) is None


def test_the_definition_of_a_natural_instructions_task_is_not_contamination(tmp_path):
    definition = (
        "In this task you are given a story and have to write a question that asks about its end in one sentence"
    )
    against = built(tmp_path, [{"Definition": [definition], "Instances": [{"input": QUESTION, "output": ["72"]}]}])
    assert against.check(chat(f"{definition}\nA story.", "b")) is None
    assert against.check(chat(f"{definition}\n{QUESTION}", "b")) is not None


def test_a_chunk_gives_what_each_gives_alone(tmp_path):
    against = built(tmp_path, [{"question": QUESTION}, {"question": SHORT}])
    many = [
        chat("a", "b"),
        chat(QUESTION, "b"),
        chat("", ""),
        chat("c", SHORT),
        chat("the end of " + QUESTION[:40], QUESTION[40:60]),
    ]
    assert [str(one) for one in against.check_all(many)] == [str(against.check(one)) for one in many]
    assert against.check_all([]) == []


def test_a_run_does_not_reach_from_one_conversation_into_the_next(tmp_path):
    words = QUESTION.split()
    halves = [chat(" ".join(words[:8])), chat(" ".join(words[8:]))]
    assert built(tmp_path, [{"question": QUESTION}]).check_all(halves) == [None, None]


def test_it_travels_to_other_processes(tmp_path):
    against = pickle.loads(pickle.dumps(built(tmp_path, [{"question": QUESTION}])))
    assert against.check(chat(QUESTION, "72")) is not None


def test_the_first_of_several_files_is_named_and_limits_count(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"q": QUESTION}) + "\n" + json.dumps({"q": SHORT}) + "\n")
    both = Contamination.build(DecontaminateSection(against=["b.jsonl", "a.jsonl"]), tmp_path, 1 << 20)
    refused = both.check(chat(QUESTION, "72"))
    assert refused is not None and refused.detail.endswith("b.jsonl:1")
    assert [one["path"] for one in both.described()] == ["b.jsonl", "a.jsonl"]
    assert all(len(one["sha256"]) == 64 and one["records"] == 2 for one in both.described())
    one = Contamination.build(DecontaminateSection(against=[Source(path="a.jsonl", limit=1)]), tmp_path, 1 << 20)
    assert one.check(chat(SHORT, "x")) is None


def test_an_evaluation_file_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"q": "a"}\n{"q": \n')
    with pytest.raises(DataError, match=r"bad.jsonl:2"):
        Contamination.build(DecontaminateSection(against=["bad.jsonl"]), tmp_path, 1 << 20)
    with pytest.raises(ConfigError):
        Contamination.build(DecontaminateSection(against=["missing.jsonl"]), tmp_path, 1 << 20)


def test_nothing_to_look_for(tmp_path):
    against = built(tmp_path, [{"q": "a"}])
    assert against.check(chat(QUESTION, "b")) is None
    assert np.array_equal(against.places, [[0, 1]])


@pytest.mark.shared
def test_real_evaluation_files_find_themselves_and_nothing_else(shared_data):
    section = DecontaminateSection(against=["humaneval/human_eval.jsonl", "bfcl/BFCL_v4_multiple.json"])
    against = Contamination.build(section, shared_data, 1 << 26)
    problems = [json.loads(line) for line in (shared_data / "humaneval/human_eval.jsonl").read_text().splitlines()]
    found = against.check_all([chat(one["prompt"], one["canonical_solution"]) for one in problems])
    assert {one["entry_point"] for one, refused in zip(problems, found, strict=True) if refused is None} <= {"add"}
    rows = json.loads((shared_data / "llama_factory/alpaca_en_demo.json").read_text())
    rows += json.loads((shared_data / "gsm8k/gsm_8k_train.json").read_text())[:1000]
    assert not any(against.check_all([chat(f"{row['instruction']}\n{row['input']}", row["output"]) for row in rows]))
