"""A task's data as questions with reference answers: read and checked before any model is loaded."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.formats import to_conversations
from dstune.data.sources import expand, read
from dstune.errors import DataError, Problem
from dstune.evaluation.tasks import Task
from dstune.evaluation.text import extract

_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Question:
    """One prompt and its reference answer."""

    prompt: Conversation
    """All messages before the last assistant one."""
    answer: Message
    """The last assistant message, as the data has it."""
    expected: str
    """The reference for metrics that compare: extracted and normalised."""
    source: str
    """The file, as the tasks file writes it."""
    line: int
    part: int

    @property
    def place(self) -> str:
        """`file:line`."""
        return f"{self.source}:{self.line}"

    @property
    def answered(self) -> Conversation:
        """Prompt and reference together."""
        return replace(self.prompt, messages=(*self.prompt.messages, self.answer))


@dataclass(frozen=True)
class Questions:
    """What a task's data gave."""

    asked: list[Question]
    refused: int
    """Records left out because they could not be read or hold no answer (only with `bad_rows: skip`)."""


def read_questions(task: Task, base: Path) -> Questions:
    """The questions of `task`; relative paths are relative to `base`. Raises DataError with file and line of what is wrong."""
    asked: list[Question] = []
    problems: list[Problem] = []
    for found in _each(task, base):
        if isinstance(found, Problem):
            problems.append(found)
        else:
            asked.append(found)
    if problems and task.bad_rows == "error":
        more = len(problems) - _SHOWN_PROBLEMS
        shown = problems[:_SHOWN_PROBLEMS]
        if more > 0:
            shown.append(Problem("", f"and {more} more"))
        raise DataError(
            [
                *shown,
                Problem(f"task {task.name}", "records that cannot be asked", do="`bad_rows: skip` leaves them out"),
            ]
        )
    if not asked:
        raise DataError(Problem(f"task {task.name}", f"{task.data} holds no question with an answer"))
    return Questions(asked, len(problems))


def _each(task: Task, base: Path) -> Iterator[Question | Problem]:
    source = task.source()
    taken = 0
    for file in expand(source, base):
        for record in read(file):
            if task.limit is not None and taken >= task.limit:
                return
            taken += 1
            place = f"{file.name}:{record.line}"
            if record.value is None:
                yield Problem(place, str(record.error))
                continue
            try:
                conversations = to_conversations(record.value, file.source)
            except Refused as refused:
                yield Problem(place, str(refused))
                continue
            for part, conversation in enumerate(conversations):
                try:
                    yield question(task, conversation, file.name, record.line, part)
                except Refused as refused:
                    yield Problem(place, str(refused))


def question(task: Task, conversation: Conversation, source: str, line: int, part: int) -> Question:
    """The question that `conversation` holds for `task`. Raises Refused."""
    messages = conversation.messages
    last = max((number for number, message in enumerate(messages) if message.role == "assistant"), default=None)
    if last is None:
        raise Refused("no_reference", "no assistant message to compare with")
    prompt, answer = messages[:last], messages[last]
    if not any(message.role != "system" for message in prompt):
        raise Refused("no_prompt", "nothing is asked before the assistant's message")
    if task.generates and not answer.content.strip():
        came = "the last assistant message calls a tool and says nothing" if answer.tool_calls else "it is empty"
        raise Refused("no_reference", came)
    if task.system is not None and not any(message.role == "system" for message in prompt):
        prompt = (Message("system", task.system), *prompt)
    return Question(replace(conversation, messages=prompt), answer, _expected(task, answer.content), source, line, part)


def _expected(task: Task, reference: str) -> str:
    picked = extract(reference, pattern_of(task), task.extract_match == "last")
    expected = task.normalised(reference if picked is None else picked)
    if task.labels and expected not in task.normalised_labels():
        raise Refused("unknown_label", f"the reference {expected[:80]!r} is none of the labels {task.labels}")
    return expected


def pattern_of(task: Task) -> re.Pattern[str] | None:
    """The task's `extract`, ready to use."""
    return re.compile(task.extract) if task.extract else None
