"""`dstune evaluate`: put every question of a tasks file to a model, score the answers, write both down."""

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dstune import __version__, atomic
from dstune.config.load import load_model
from dstune.errors import Problem, UsageError
from dstune.evaluation.asking import Asked, compared, counts, encode, find_answers, find_likelihoods, output_line
from dstune.evaluation.metrics import build
from dstune.evaluation.questions import Questions, read_questions
from dstune.evaluation.tasks import Task, TasksFile
from dstune.loggers import get_logger
from dstune.model.open import OpenedModel, open_model
from dstune.records.evaluation import Estimate, Evaluation, TaskResult

RESULTS = "results.json"
OUTPUTS = "outputs.jsonl"

_PACKAGES = ("torch", "transformers", "evaluate", "sacrebleu", "rouge-score")
_log = get_logger(__name__)


def evaluate(
    model: str, tasks_file: str | Path, out: str | Path | None = None, *, overwrite: bool = False, **opening: Any
) -> dict[str, Any]:
    """Every task's figures with their 95% intervals: the content of `out/results.json`, beside which `out/outputs.jsonl` stands.

    `out`: default `evaluations/MODEL/TASKS[-N]` here. `opening` goes to `open_model`, over the tasks file's own dtype, device and
    template. Data is read and checked first, the model loaded then. Raises UsageError, ConfigError, DataError, RunFailed.
    """
    file = Path(tasks_file).absolute()
    tasks = load_model(file, TasksFile)
    directory = _directory(out, model, file, overwrite)
    questions = [read_questions(task, file.parent) for task in tasks.tasks]
    settings: dict[str, Any] = {
        "dtype": tasks.dtype,
        "device": tasks.device,
        "template": tasks.template,
        "base": file.parent,
    }
    opened = open_model(model, **{**settings, **opening})
    results: list[TaskResult] = []
    lines: list[str] = []
    with _bar() as bar:
        for task, asked in zip(tasks.tasks, questions, strict=True):
            result, outputs = _do(task, asked, opened, bar)
            results.append(result)
            lines += outputs
    directory.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(
        model=model,
        tasks_file=str(tasks_file),
        device=_device_name(opened),
        dtype=opened.dtype,
        template=opened.encoder.fingerprint(),
        versions={"dstune": __version__} | {name: importlib.metadata.version(name) for name in _PACKAGES},
        tasks=results,
        outputs=str(directory / OUTPUTS),
    ).to_dict()
    atomic.write_text(directory / OUTPUTS, "".join(line + "\n" for line in lines))
    # Last: who finds results.json finds the outputs that it is made of.
    atomic.write_json(directory / RESULTS, evaluation)
    return evaluation


def _do(task: Task, questions: Questions, model: OpenedModel, bar: Progress) -> tuple[TaskResult, list[str]]:
    """One task: its figures, and its lines of outputs.jsonl."""
    started = time.monotonic()
    asked, overlong = encode(task, questions.asked, model)
    if task.scores:
        with _step(bar, f"{task.name}: likelihood", len(asked)) as progress:
            find_likelihoods(task, asked, model, progress)
    if task.generates:
        with _step(bar, task.name, len(asked)) as progress:
            find_answers(task, asked, model, progress)
    metrics, details = _figures(task, asked)
    result = TaskResult(
        name=task.name,
        examples=len(asked),
        metrics=metrics,
        details=details,
        counts={"refused": questions.refused, "overlong": overlong, **counts(task, asked)},
        settings=task.model_dump(mode="json", exclude_none=True),
        seconds=time.monotonic() - started,
    )
    if (cut := result.counts.get("truncated", 0)) > 0.1 * result.examples:
        limit = task.generation.max_new_tokens
        _log.warning("task %s: %d of %d answers were cut at %d tokens", task.name, cut, result.examples, limit)
    return result, [output_line(task, one) for one in asked]


def _figures(task: Task, asked: list[Asked]) -> tuple[dict[str, Estimate], dict[str, dict[str, Any]]]:
    """The task's metrics over all examples, and into `asked` each example's own."""
    figures: dict[str, Estimate] = {}
    details: dict[str, dict[str, Any]] = {}
    for spec in task.metrics:
        metric = build(spec, task)
        predictions, references = compared(spec.name, task, asked)
        values = metric.compute(predictions=predictions, references=references) or {}
        figures |= metric.estimates(values)
        if found := metric.details():
            details[spec.name] = found
        for one, row in zip(asked, metric.rows, strict=True):
            one.scores.update(metric.example(row))
    return figures, details


def _directory(out: str | Path | None, model: str, tasks_file: Path, overwrite: bool) -> Path:
    if out is None:
        return _unused_directory(model, tasks_file)
    directory = Path(out).absolute()
    if directory.exists() and not directory.is_dir():
        raise UsageError(Problem(str(out), "is a file", "a directory for the results"))
    if (directory / RESULTS).exists() and not overwrite:
        raise UsageError(Problem(str(out), "holds results already", do="Name another directory, or remove that one."))
    return directory


def _unused_directory(model: str, tasks_file: Path) -> Path:
    name = "".join(character if character.isalnum() or character in "._-" else "-" for character in Path(model).name)
    base = Path("evaluations").absolute() / (name.strip(".") or "model")
    number, directory = 1, base / tasks_file.stem
    while directory.exists():
        number += 1
        directory = base / f"{tasks_file.stem}-{number}"
    return directory


def _device_name(model: OpenedModel) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{model.device.type} ({platform.machine()})"


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def _step(bar: Progress, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """One line of the progress display, for as long as its work takes; yields what advances it."""
    task = bar.add_task(escape(title), total=total)
    yield lambda count: bar.advance(task, count)
    bar.remove_task(task)
