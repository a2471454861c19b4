"""Blanks of a form that nobody filled in, and answers that are empty."""

import re
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field

from dstune.data.cleaning.step import Step, answers, edited, without_code
from dstune.data.conversation import Conversation

Kind = Literal["braces", "brackets", "insert", "nooutput", "empty"]

_BRACES = re.compile(r"(?<![\\\w}^{$%])\{\{ {0,2}([A-Za-z_][A-Za-z0-9_.-]{0,39}) {0,2}\}\}(?!\})")
_BRACKETS = re.compile(
    r"\[(?:(?:your|insert|enter|add) [^\[\]\n]{1,60}|(?:company|recipient(?:'s)?|customer|client|sender|full|first|last) ?name"
    r"|recipient|name)\](?!\()"
    r"|\[(?:你的|您的|插入|填写|输入)[^\[\]\n]{1,30}\](?!\()|【(?:你的|您的|插入|填写)[^【】\n]{1,30}】",
    re.IGNORECASE,
)
_INSERT = re.compile(r"<(?:insert|enter|add|your|fill in) [^<>\n=]{1,60}>|<placeholder>", re.IGNORECASE)
_NO_OUTPUT = re.compile(r"\s*<\s*(?:no[ _]?(?:output|input))\s*>\s*", re.IGNORECASE)


class Placeholders(Step):
    """Drops conversations with blanks that were never filled in: `{{name}}` in any turn, and in the assistant's turns `[Your Name]`,
    `<insert …>`, `<nooutput>` and nothing at all. Fenced code does not count, nor braces after LaTeX commands.

    `values` fills in `{{name}}` first, in every turn: `{name: Ada, author: ACME}`.
    """

    name: ClassVar[str] = "placeholders"
    values: dict[str, str] = Field(default={})
    """What stands for `{{key}}`."""
    kinds: tuple[Kind, ...] = ("braces", "insert", "nooutput", "empty")
    """What is looked for. `brackets` is not by default: letters that are meant as a form have `[Your Name]` on purpose."""
    action: Literal["drop", "flag"] = "drop"
    """What becomes of a conversation that has one."""

    def apply(self, conversation: Conversation) -> Conversation:
        if self.values:
            conversation = edited(conversation, partial(_BRACES.sub, self._value))
        if self.action == "drop" and (found := self._found(conversation)):
            raise self.refuse(found)
        return conversation

    def flags(self, conversation: Conversation) -> tuple[str, ...]:
        if self.action == "drop":
            return ()
        filled = edited(conversation, partial(_BRACES.sub, self._value)) if self.values else conversation
        return (self.name,) if self._found(filled) else ()

    def _value(self, blank: re.Match[str]) -> str:
        return self.values.get(blank[1], blank[0])

    def _found(self, conversation: Conversation) -> str:
        """Which blank there is; empty where there is none."""
        if "braces" in self.kinds:
            for message in conversation.messages:
                if "{{" in message.content and (blank := _BRACES.search(without_code(message.content))):
                    return f"{blank[0]} was never filled in"
        for answer in answers(conversation):
            if found := self._in_answer(answer):
                return found
        return ""

    def _in_answer(self, answer: str) -> str:
        if "empty" in self.kinds and not answer.strip():
            return "an answer is empty"
        if "nooutput" in self.kinds and _NO_OUTPUT.fullmatch(answer):
            return f"an answer is {answer.strip()}"
        for kind, pattern, sign in (
            ("brackets", _BRACKETS, "["),
            ("brackets", _BRACKETS, "【"),
            ("insert", _INSERT, "<"),
        ):
            if kind in self.kinds and sign in answer and (blank := pattern.search(without_code(answer))):
                return f"{blank[0]} was never filled in"
        return ""
