"""Tasks files: what they accept, and what they say where they are wrong; the questions that data gives."""

import json
from pathlib import Path

import pytest

from dstune.config.load import load_model
from dstune.errors import ConfigError, DataError
from dstune.evaluation.questions import read_questions
from dstune.evaluation.tasks import Task, TasksFile


def load(folder: Path, text: str) -> TasksFile:
    file = folder / "tasks.yaml"
    file.write_text(text)
    return load_model(file, TasksFile)


def refused(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(folder, text)
    return str(error.value)


def test_metrics_are_names_or_names_with_settings(tmp_path):
    tasks = load(
        tmp_path,
        """
tasks:
  - name: a
    data: x.json
    metrics: [exact_match, bleu: {tokenize: zh}, {f1: {average: micro}}, rouge: ]
    labels: [yes, no]
    normalise: [strip, lower]
    generation: {max_new_tokens: 5, stop: ["\\n"]}
""",
    )
    task = tasks.tasks[0]
    assert [spec.name for spec in task.metrics] == ["exact_match", "bleu", "f1", "rouge"]
    assert task.metrics[1].options.model_dump() == {"tokenize": "zh", "lowercase": False}
    assert task.labels == ["yes", "no"]
    assert task.generates and not task.scores


def test_every_mistake_is_named_with_its_line_and_nearest_key(tmp_path):
    message = refused(
        tmp_path,
        """tasks:
  - name: a
    data: x.json
    metrics:
      - exact_match
      - blue
  - name: b
    data: x.json
    metrics:
      - bleu: {tokenise: zh}
    generation:
      max_new_token: 5
""",
    )
    assert "tasks.yaml:6" in message and "did you mean 'bleu'?" in message
    assert "tasks.yaml:10" in message and "did you mean 'tokenize'?" in message
    assert "tasks.yaml:12" in message and "did you mean 'max_new_tokens'?" in message


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("metrics: [f1]", "f1 wants `labels: [...]`"),
        ("metrics: [f1, f1]\n    labels: [a]", "is there twice"),
        ("metrics: [accuracy]\n    labels: [A, a]\n    normalise: lower", "the same after `normalise`"),
        ("metrics: [f1: {average: binary}]\n    labels: [a, b]", "go together"),
        ("metrics: [f1: {average: binary, positive: c}]\n    labels: [a, b]", "none of the labels"),
        ("metrics: [exact_match]\n    extract: '(a'", "not a regular expression"),
        ("metrics: []", "at least 1"),
        ("metrics: [exact_match: {}, bleu: 3]", "metrics.1"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, lines, says):
    assert says in refused(tmp_path, f"tasks:\n  - name: a\n    data: x.json\n    {lines}\n")


def test_two_tasks_of_one_name_are_refused(tmp_path):
    task = "  - {name: a, data: x, metrics: [bleu]}\n"
    assert "two tasks are named 'a'" in refused(tmp_path, "tasks:\n" + task + task)


def questions(folder: Path, records: list, **task):
    (folder / "data.jsonl").write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return read_questions(Task(name="t", data="data.jsonl", **{"metrics": ["exact_match"], **task}), folder)


def chat(*turns: str) -> dict:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]}


def test_the_last_assistant_message_is_the_reference(tmp_path):
    found = questions(tmp_path, [chat("s be brief", "u 1?", "a one", "u 2?", "a  two ", "u ignored")])
    (question,) = found.asked
    assert [message.content for message in question.prompt.messages] == ["be brief", "1?", "one", "2?"]
    assert (question.answer.content, question.expected) == (" two ", "two")
    assert question.place == "data.jsonl:1"
    assert [message.content for message in question.answered.messages][-1] == " two "


def test_every_training_format_evaluates(tmp_path):
    records = [
        {"instruction": "Add", "input": "1 1", "output": "2"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "2"}]},
        {"prompt": "q", "completion": "2"},
        chat("u q", "a 2"),
    ]
    assert [question.expected for question in questions(tmp_path, records).asked] == ["2"] * 4


def test_a_system_message_is_put_where_there_is_none(tmp_path):
    found = questions(tmp_path, [chat("u q", "a r"), chat("s own", "u q", "a r")], system="given")
    assert [question.prompt.messages[0].content for question in found.asked] == ["given", "own"]


def test_bad_records_stop_with_file_and_line_or_are_counted(tmp_path):
    records = [chat("u q", "a r"), chat("u q"), chat("a r"), {"what": "else"}]
    with pytest.raises(DataError) as error:
        questions(tmp_path, records)
    for place in ("data.jsonl:2", "data.jsonl:3", "data.jsonl:4"):
        assert place in str(error.value)
    assert "bad_rows: skip" in str(error.value)
    found = questions(tmp_path, records, bad_rows="skip")
    assert (len(found.asked), found.refused) == (1, 3)


def test_no_question_at_all_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no question"):
        questions(tmp_path, [chat("u q")], bad_rows="skip")


def test_limit_takes_records_from_the_top(tmp_path):
    found = questions(tmp_path, [chat("u q", f"a {number}") for number in range(5)], limit=2)
    assert [question.expected for question in found.asked] == ["0", "1"]


def test_extract_picks_from_the_reference_too(tmp_path):
    records = [chat("u q", "a 1 + 1 = 2, so #### 1,002"), chat("u q", "a 7")]
    found = questions(tmp_path, records, extract=r"#### (-?[\d.,]+)", normalise="number")
    assert [question.expected for question in found.asked] == ["1002", "7"]


def test_a_reference_that_is_no_label_is_refused_with_its_line(tmp_path):
    with pytest.raises(DataError, match=r"data.jsonl:2.*none of the labels"):
        questions(
            tmp_path, [chat("u q", "a Yes"), chat("u q", "a maybe")], metrics=["f1"], labels=["yes"], normalise="lower"
        )


def test_builtin_instructions_have_a_test_split(tmp_path):
    task = Task(name="t", data="builtin:instructions", split="test", limit=20, metrics=["exact_match"])
    assert len(read_questions(task, tmp_path).asked) == 20
