"""Answers that are no answers: boilerplate by which another model refused."""

import re
from functools import cached_property
from typing import ClassVar

from pydantic import Field, field_validator

from dstune.data.cleaning.step import Step, answers
from dstune.data.conversation import Conversation

_HEAD_CHARACTERS = 300
_MODEL = r"an? (?:\w+[ -]){0,2}?(?:AI|artificial intelligence|language model|chat ?bot|virtual assistant)\b"
_SORRY = (
    r"(?:(?:I'm|I am) (?:really |very |so |deeply )?sorry|I apologi[sz]e|(?:my |our )?apologies|sorry|unfortunately|regrettably)"
    r"[,.]? (?:but )?"
)
_CANNOT = r"I(?: (?:cannot|can't|can not|won't be able to)|(?:'m| am) (?:currently )?(?:unable|not able) to)"
_SERVE = (
    r"(?:assist|help (?:you )?with|fulfil|provide|comply|complete (?:this|that|the|your)|answer|process|generate|perform|browse|access|"
    r"retrieve|engage in|participate in|support|discuss|do (?:that|this)|book|order)"
)
_NEVER = r"(?:cannot|can't|don't|do not|unable|not able|not capable|incapable|lack|no (?:personal|access|ability|feelings|emotions))\b"
_ABLE = r"(?:the )?(?:capability|ability|access|real-?time|personal)"
_SORRY_ZH = r"(?:很|非常|十分)?(?:抱歉|对不起|不好意思|遗憾)[,，。!！\s]{0,2}(?:但是?|不过)?"
_MODEL_ZH = r"(?:一个|一名|一款|个)?(?:大型|智能)?(?:AI|人工智能|语言模型|虚拟助手|聊天机器人)"
_NEVER_ZH = r"[^。！？!?\n]{0,60}?(?:无法|不能|没有|不具备|并不)"
_KNOWN = (
    rf"{_SORRY}(?:as|I'm|I am) (?:just |only )?{_MODEL}",
    rf"{_SORRY}{_CANNOT} {_SERVE}",
    rf"{_SORRY}I (?:do not|don't) have {_ABLE}",
    rf"As {_MODEL}[^.!?\n]{{0,150}}?\b{_NEVER}",
    rf"{_CANNOT} (?:assist with|help (?:you )?with (?:that|this)|fulfil|comply|engage in|participate in)",
    rf"(?:{_SORRY_ZH})?(?:由于|因为)?作为{_MODEL_ZH}{_NEVER_ZH}",
    rf"(?:{_SORRY_ZH}|由于|因为){{1,2}}我(?:只)?是{_MODEL_ZH}{_NEVER_ZH}",
    rf"{_SORRY_ZH}我(?:目前|暂时|现在)?(?:无法|不能|没有能力)(?:直接)?"
    r"(?:帮助?[您你]|[为给][您你]|协助|提供|回答|完成|执行|满足|处理|生成|访问|查询|获取|预订)",
)


class Refusals(Step):
    """Drops a conversation whose final answer begins as a refusal: "I'm sorry, but as an AI language model …", "I cannot assist with
    …", "很抱歉，我无法为您…". English and Chinese; only the beginning counts, so that a letter that declines an invitation stays."""

    name: ClassVar[str] = "refusals"
    patterns: list[str] = Field(default=[])
    """Further regular expressions that a refusal begins with, without regard to case."""
    builtin: bool = True
    """Whether the known beginnings count too."""

    @field_validator("patterns")
    @classmethod
    def _regular(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return patterns

    @cached_property
    def _refusal(self) -> re.Pattern[str]:
        known = [*(_KNOWN if self.builtin else ()), *self.patterns]
        return re.compile("|".join(f"(?:{pattern})" for pattern in known) if known else r"(?!)", re.IGNORECASE)

    def apply(self, conversation: Conversation) -> Conversation:
        *_, last = ("", *answers(conversation))
        head = last.lstrip(" \t\n\"'“*#>")[:_HEAD_CHARACTERS].replace("\u2019", "'")
        if found := self._refusal.match(head):
            raise self.refuse(f"the final answer begins with {found[0]!r}")
        return conversation
