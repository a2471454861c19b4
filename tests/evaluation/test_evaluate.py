"""`evaluate` from a tasks file to results.json on tiny random models."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dstune.data.conversation import Conversation, Message
from dstune.errors import DataError, UsageError
from dstune.evaluation.evaluate import evaluate
from dstune.evaluation.table import results_table
from dstune.generate import Settings, generate
from dstune.model.open import open_model
from tests.evaluation.models import save_llama, save_t5

TASKS = """
dtype: fp32
tasks:
  - name: free
    data: questions.jsonl
    metrics: [exact_match, token_f1, bleu, chrf: {word_order: 2}, rouge, perplexity]
    generation: {max_new_tokens: 8, batch_size: 3}
  - name: labels
    data: labels.jsonl
    labels: [positive, negative]
    normalise: [strip, lower]
    metrics: [accuracy, precision, recall, f1: {average: weighted}]
    generation: {max_new_tokens: 4}
  - name: likelihood
    data: builtin:instructions
    split: test
    limit: 4
    metrics: [perplexity]
"""


@pytest.fixture(scope="module", params=[save_llama, save_t5])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(request.param(tmp_path_factory.mktemp("model")))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    questions = [{"prompt": f"Say {text}", "completion": text} for text in ("yes", "北京", "no, never", "1 2 3", "x")]
    labels = [{"prompt": f"{n}?", "completion": "Positive" if n % 3 else "negative"} for n in range(6)]
    for name, records in (("questions", questions), ("labels", labels)):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(text)
    file = tmp_path / "tasks.yaml"
    file.write_text(TASKS)
    return file


def read_outputs(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]


def test_results_and_outputs_of_all_tasks(model, tasks, tmp_path):
    results = evaluate(model, tasks, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    free, labels, likelihood = results["tasks"]
    assert list(free["metrics"]) == [
        *("exact_match", "token_f1", "bleu", "chrf++", "rouge1", "rouge2", "rougeL", "rougeLsum"),
        *("perplexity", "nats_per_token"),
    ]
    for task in results["tasks"]:
        for estimate in task["metrics"].values():
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
            assert estimate["n"] == task["examples"]
    # A random model names no label: every answer is wrong, and counted so.
    assert labels["counts"]["unparsable"] == 6
    assert labels["metrics"]["accuracy"]["value"] == 0
    assert labels["details"]["f1"]["labels"]["positive"]["support"] == 4
    assert "new_tokens" not in likelihood["counts"]
    assert likelihood["metrics"]["perplexity"]["value"] > 100
    outputs = read_outputs(tmp_path / "out")
    assert len(outputs) == 5 + 6 + 4
    assert outputs[1]["reference"] == "北京" and (outputs[1]["source"], outputs[1]["line"]) == ("questions.jsonl", 2)
    assert "prediction" in outputs[1] and "prediction" not in outputs[-1]
    assert outputs[0]["scores"]["exact_match"] == 0.0 and outputs[-1]["scores"]["perplexity"] > 1


def test_predictions_are_the_models_answers_to_the_prompts(model, tasks, tmp_path):
    evaluate(model, tasks, tmp_path / "out")
    opened = open_model(model, dtype="fp32")
    for line in read_outputs(tmp_path / "out")[:3]:
        (prompt,) = opened.prompts([Conversation(tuple(Message(**message) for message in line["prompt"]))])
        (answer,) = generate(opened, [prompt.ids], Settings(max_new_tokens=8))
        assert (line["prediction"], line["finished"]) == (answer.text, answer.finished)


def test_a_model_that_answers_right_scores_full_marks(model, tasks, tmp_path):
    """The model's own answers as references."""
    evaluate(model, tasks, tmp_path / "first")
    lines = [line for line in read_outputs(tmp_path / "first") if line["task"] == "free" and line["prediction"].strip()]
    assert lines
    (tmp_path / "questions.jsonl").write_text(
        "".join(
            json.dumps({"prompt": line["prompt"][0]["content"], "completion": line["prediction"]}) + "\n"
            for line in lines
        )
    )
    (free, *_) = evaluate(model, tasks, tmp_path / "second")["tasks"]
    assert free["metrics"]["exact_match"]["value"] == 1
    assert free["metrics"]["chrf++"]["value"] == pytest.approx(100)


def test_results_are_never_overwritten_silently(model, tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = evaluate(model, tasks), evaluate(model, tasks)
    assert first["outputs"] != second["outputs"] and Path(first["outputs"]).is_file()
    folder = Path(first["outputs"]).parent
    with pytest.raises(UsageError, match="holds results already"):
        evaluate(model, tasks, folder)
    evaluate(model, tasks, folder, overwrite=True)


def test_data_is_checked_before_the_model_is_loaded(tasks, tmp_path):
    (tmp_path / "labels.jsonl").write_text('{"prompt": "q", "completion": "maybe"}\n')
    with pytest.raises(DataError, match=r"labels\.jsonl:1.*none of the labels"):
        evaluate("/nowhere/at/all", tasks, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_beyond_the_context_stop_or_are_counted(tmp_path):
    model = str(save_llama(tmp_path / "small", context=64))
    (tmp_path / "q.jsonl").write_text(
        '{"prompt": "short", "completion": "a"}\n{"prompt": "' + "long " * 60 + '", "completion": "a"}\n'
    )
    text = "tasks:\n- {name: t, data: q.jsonl, metrics: [exact_match], generation: {max_new_tokens: 8}"
    (tmp_path / "stop.yaml").write_text(text + "}\n")
    (tmp_path / "skip.yaml").write_text(text + ", overlong: skip}\n")
    with pytest.raises(DataError, match=r"q\.jsonl:2: needs \d+ tokens, more than the model's 64"):
        evaluate(model, tmp_path / "stop.yaml", tmp_path / "a")
    (task,) = evaluate(model, tmp_path / "skip.yaml", tmp_path / "b")["tasks"]
    assert (task["examples"], task["counts"]["overlong"]) == (1, 1)


def test_a_tasks_file_that_is_not_there(model, tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        evaluate(model, tmp_path / "none.yaml")


def test_the_table_shows_every_figure_and_takes_names_as_text(model, tasks, tmp_path):
    results = evaluate(model, tasks, tmp_path / "out")
    results["model"] = "[bold]odd"
    out = io.StringIO()
    Console(file=out, width=140).print(results_table(results))
    for word in ("[bold]odd", "rougeLsum", "f1_weighted", "6 name no label", "nats_per_token"):
        assert word in out.getvalue()


def test_importing_the_tasks_and_questions_does_not_import_torch():
    code = "import sys, dstune.evaluation.questions, dstune.evaluation.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
