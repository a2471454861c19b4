"""The questions of one task on their way through one model: tokens, likelihoods, answers, what metrics get to see."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from dstune.data.conversation import Example, Refused
from dstune.errors import DataError, Problem, RunFailed
from dstune.evaluation.metrics import COMPARED
from dstune.evaluation.questions import Question, pattern_of
from dstune.evaluation.tasks import Task
from dstune.evaluation.text import extract
from dstune.generate import Answer, Settings, generate
from dstune.model.open import OpenedModel, Prompt
from dstune.score import score

_NOT_FOUND = "\0"
"""In place of an answer in which `extract` found nothing: equals no reference and is no label."""
_SHOWN_PROBLEMS = 3
Progress = Callable[[int], None]
T = TypeVar("T")


@dataclass
class Asked:
    """A question as this model gets it, and all that comes of it."""

    question: Question
    prompt: Prompt | None
    """Where answers are asked for."""
    example: Example | None
    """Prompt and reference tokenised, where perplexity is asked for."""
    answer: Answer | None = None
    log_probabilities: np.ndarray | None = None
    """Of the reference's tokens, natural logarithms, float32."""
    extracted: str | None = None
    """The part of the answer that is compared; None where `extract` found none."""
    scores: dict[str, float] = field(default_factory=dict)


def encode(task: Task, questions: Sequence[Question], model: OpenedModel) -> tuple[list[Asked], int]:
    """The questions as token ids, and how many were left out as too long. Raises DataError."""
    asked: list[Asked] = []
    problems: list[Problem] = []
    places = [question.place for question in questions]
    nothing = [None] * len(questions)
    prompts = _whole(model.prompts([one.prompt for one in questions]), places) if task.generates else nothing
    examples = nothing
    if task.scores:
        examples = _whole(model.encoder.encode_batch([one.answered for one in questions]), places)
    for question, prompt, example in zip(questions, prompts, examples, strict=True):
        needed = _tokens_needed(task, len(prompt.ids) if prompt else 0, example, model)
        if model.context is not None and needed > model.context:
            came = f"needs {needed} tokens, more than the model's {model.context}"
            problems.append(Problem(question.place, came))
        else:
            asked.append(Asked(question, prompt, example))
    if problems and (task.overlong == "error" or not asked):
        what = f"{len(problems)} questions are too long"
        do = "Fewer `generation.max_new_tokens`, or `overlong: skip`."
        raise DataError([*problems[:_SHOWN_PROBLEMS], Problem(f"task {task.name}", what, do=do)])
    return asked, len(problems)


def _whole(encoded: Sequence[T | Refused], places: Sequence[str]) -> list[T]:
    """What was encoded. Raises DataError with the places of what the template or the tokenizer refused."""
    pairs = list(zip(encoded, places, strict=True))
    problems = [Problem(place, str(one)) for one, place in pairs if isinstance(one, Refused)]
    if problems:
        raise DataError(problems[:_SHOWN_PROBLEMS])
    return [one for one, _ in pairs if not isinstance(one, Refused)]


def _tokens_needed(task: Task, prompt: int, example: Example | None, model: OpenedModel) -> int:
    """The longest sequence that a question makes: prompt and answer together, or apart for an encoder and a decoder."""
    new = task.generation.max_new_tokens if task.generates else 0
    target = int(example.loss_mask.sum()) if example else 0
    whole = len(example.input_ids) if example else 0
    if model.seq2seq:
        return max(prompt, new, target, whole - target)
    return max(prompt + new, whole)


def find_likelihoods(task: Task, asked: Sequence[Asked], model: OpenedModel, progress: Progress) -> None:
    """Fill `log_probabilities`. Raises RunFailed where they are not finite."""
    examples = [one.example for one in asked if one.example is not None]
    made = score(model, examples, task.generation.batch_size, progress)
    for one, values in zip(asked, made, strict=True):
        if not np.isfinite(values).all():
            came = "the model gives its answer no finite probability (NaN in the weights?)"
            raise RunFailed(Problem(one.question.place, came))
        one.log_probabilities = values


def find_answers(task: Task, asked: Sequence[Asked], model: OpenedModel, progress: Progress) -> None:
    """Fill `answer` and `extracted`."""
    written = task.generation
    settings = Settings(
        max_new_tokens=written.max_new_tokens,
        temperature=written.temperature,
        top_p=written.top_p,
        top_k=written.top_k,
        seed=written.seed,
        stop=tuple(written.stop),
    )
    prompts = [one.prompt.ids for one in asked if one.prompt is not None]
    answers = generate(model, prompts, settings, written.batch_size, progress)
    for one, answer in zip(asked, answers, strict=True):
        one.answer = answer
        one.extracted = _picked(task, answer.text)


def compared(metric: str, task: Task, asked: Sequence[Asked]) -> tuple[list[Any], list[Any]]:
    """Predictions and references as the metric of that name takes them."""
    if metric == "perplexity":
        made = [one.log_probabilities for one in asked if one.log_probabilities is not None]
        return [-float(values.sum(dtype=np.float64)) for values in made], [len(values) for values in made]
    if metric in COMPARED:
        return [_said(task, one) for one in asked], [one.question.expected for one in asked]
    texts = [one.question.answer.content for one in asked]
    picked = [_picked(task, text) for text in texts]
    wanted = [text if part is None else part for text, part in zip(texts, picked, strict=True)]
    return [one.extracted or "" for one in asked], wanted


def counts(task: Task, asked: Sequence[Asked]) -> dict[str, int]:
    """What to know about a task's answers beside their figures."""
    answers = [one.answer for one in asked if one.answer is not None]
    if not answers:
        return {}
    found = {
        "truncated": sum(not answer.finished for answer in answers),
        "empty": sum(not answer.text.strip() for answer in answers),
        "new_tokens": sum(answer.num_tokens for answer in answers),
    }
    prompts = [one.prompt for one in asked if one.prompt is not None]
    found["control_tokens_encoded"] = sum(prompt.control_tokens_encoded for prompt in prompts)
    found["lossy_prompts"] = sum(prompt.lossy_characters > 0 for prompt in prompts)
    if task.extract:
        found["unextracted"] = sum(one.extracted is None for one in asked)
    if task.labels:
        labels = set(task.normalised_labels())
        found["unparsable"] = sum(_said(task, one) not in labels for one in asked)
    return found


def output_line(task: Task, one: Asked) -> str:
    """One line of outputs.jsonl."""
    question, answer = one.question, one.answer
    value: dict[str, Any] = {
        "task": task.name,
        "source": question.source,
        "line": question.line,
        "part": question.part,
        "prompt": question.prompt.to_dicts(),
        "reference": question.answer.content,
    }
    if question.prompt.tools:
        value["tools"] = list(question.prompt.tools)
    if answer is not None:
        value["prediction"] = answer.text
        value["finished"] = answer.finished
        value["prompt_tokens"] = len(one.prompt.ids) if one.prompt else 0
        value["new_tokens"] = answer.num_tokens
    if answer is not None and task.extract:
        value["extracted"] = one.extracted
    value["scores"] = one.scores
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _picked(task: Task, text: str) -> str | None:
    return extract(text, pattern_of(task), task.extract_match == "last")


def _said(task: Task, one: Asked) -> str:
    return _NOT_FOUND if one.extracted is None else task.normalised(one.extracted)
