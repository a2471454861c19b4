"""Conversations that are too short, too long, out of proportion, or say the same again and again."""

from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from dstune.data.cleaning.step import Step, answers, questions, without_code
from dstune.data.conversation import Conversation
from dstune.data.words import words


class Length(Step):
    """Drops conversations whose questions (all user turns together) or answers (all assistant turns together) are too short or long.

    Conversations that only call tools have no answer to measure. By default only empty ones go.
    """

    name: ClassVar[str] = "length"
    unit: Literal["characters", "words"] = "characters"
    """What is counted, blanks at the ends aside; of Chinese and the like a character is a word, and signs alone are one."""
    min_question: int = Field(default=0, ge=0)
    """Least length of the questions."""
    max_question: int | None = Field(default=None, ge=1)
    """Greatest length of the questions; none by default."""
    min_answer: int = Field(default=1, ge=0)
    """Least length of the answers."""
    max_answer: int | None = Field(default=None, ge=1)
    """Greatest length of the answers; none by default."""

    @model_validator(mode="after")
    def _ordered(self) -> "Length":
        for low, high in ((self.min_question, self.max_question), (self.min_answer, self.max_answer)):
            if high is not None and low > high:
                raise ValueError(f"a minimum of {low} above the maximum of {high}")
        return self

    def apply(self, conversation: Conversation) -> Conversation:
        self._check("question", list(questions(conversation)), self.min_question, self.max_question)
        self._check("answer", list(answers(conversation)), self.min_answer, self.max_answer)
        return conversation

    def _check(self, what: str, texts: list[str], low: int, high: int | None) -> None:
        if not texts:
            return
        counted = sum(len(text.strip()) for text in texts)
        if self.unit == "words" and counted:
            counted = max(1, len(words(texts).hashes))
        if counted < low or (high is not None and counted > high):
            bounds = f"at least {low}" if counted < low else f"at most {high}"
            raise self.refuse(f"the {what} has {counted} {self.unit}, and {bounds} are wanted")


class Ratio(Step):
    """Drops conversations whose answers are out of proportion to the questions, or repeat themselves."""

    name: ClassVar[str] = "ratio"
    min_answer: float = Field(default=0.0, ge=0)
    """Least length of the answers over that of the questions, in characters."""
    max_answer: float | None = Field(default=None, gt=0)
    """Greatest length of the answers over that of the questions; none by default."""
    max_repetition: float = Field(default=0.5, gt=0, le=1)
    """Greatest share of an answer's word n-grams that stood in it before; 1: never looked at. Fenced code does not count."""
    ngram: int = Field(default=8, ge=1, le=32)
    """Words in such an n-gram."""
    min_words: int = Field(default=100, ge=1)
    """Shorter answers may repeat themselves."""

    def apply(self, conversation: Conversation) -> Conversation:
        replies = list(answers(conversation))
        self._proportion(sum(map(len, questions(conversation))), sum(map(len, replies)))
        if self.max_repetition < 1 and replies:
            bare = [without_code(reply) for reply in replies]
            self._repetition([reply for reply in bare if len(reply) >= 2 * self.min_words or not reply.isascii()])
        return conversation

    def _proportion(self, asked: int, answered: int) -> None:
        if not asked or not answered:
            return
        share = answered / asked
        if share < self.min_answer or (self.max_answer is not None and share > self.max_answer):
            bounds = f"at least {self.min_answer}" if share < self.min_answer else f"at most {self.max_answer}"
            raise self.refuse(f"answers {share:.3g} times as long as the questions, and {bounds} is wanted")

    def _repetition(self, replies: list[str]) -> None:
        found = words(replies)
        runs, offsets = found.runs(self.ngram), found.run_offsets(self.ngram)
        for number, length in enumerate(np.diff(found.offsets)):
            if length >= max(self.min_words, self.ngram):
                of_reply = runs[offsets[number] : offsets[number + 1]]
                repeated = 1 - len(np.unique(of_reply)) / len(of_reply)
                if repeated > self.max_repetition:
                    what = f"{repeated:.0%} of an answer's runs of {self.ngram} words stood in it before"
                    raise self.refuse(f"{what}, and at most {self.max_repetition:.0%} may")
