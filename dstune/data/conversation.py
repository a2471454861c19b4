"""The one form that every input format becomes, and what a tokenised conversation looks like."""

from dataclasses import dataclass
from typing import Any

import numpy as np


class Refused(Exception):
    """A record or a conversation that dstune does not take; goes to rejects.jsonl with its reason, or stops the preparation."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        """A short machine word: `no_supervised_tokens`, `unknown_format`, `invalid_json`, …"""
        self.detail = detail
        """For a person: what came, what was expected."""
        super().__init__(f"{reason}: {detail}" if detail else reason)

    def __reduce__(self) -> tuple[type["Refused"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class Message:
    """One turn. `content` is always a string, exactly as the file had it."""

    role: str
    """`system`, `user`, `assistant` or `tool`; other roles pass through to the template."""
    content: str
    tool_calls: tuple[dict[str, Any], ...] = ()
    """Each `{"type": "function", "function": {"name": str, "arguments": dict}}`."""
    name: str | None = None
    """The speaker's, or the answering tool's, name."""
    tool_call_id: str | None = None
    reasoning: str | None = None
    """Thoughts that the file keeps beside the content (`reasoning_content`)."""
    context: str | None = None
    """Of a question made of an instruction and its input: the input, with which `content` then ends. For instruction templates."""
    input: str | None = None
    """The same apart from `content`, which is then the instruction alone: to instruction templates with a place for it."""
    train: bool | None = None
    """The file's own word on whether this turn is a target (`weight`, `loss_weight`); None: `train_on` decides alone."""

    @property
    def is_plain(self) -> bool:
        """Nothing but a role and a content, to a template."""
        named = self.name is not None or self.tool_call_id is not None
        return not (self.tool_calls or named or self.reasoning is not None or self.input is not None)

    def to_dict(self) -> dict[str, Any]:
        """As chat templates expect it: absent fields absent, tool calls a list."""
        value: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            value["reasoning_content"] = self.reasoning
        if self.input is not None:
            value["input"] = self.input
        if self.tool_calls:
            value["tool_calls"] = list(self.tool_calls)
        if self.name is not None:
            value["name"] = self.name
        if self.tool_call_id is not None:
            value["tool_call_id"] = self.tool_call_id
        return value


@dataclass(frozen=True)
class Conversation:
    """Messages in order, and the tools that the assistant may call (JSON schemas)."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    document: bool = False
    """Plain text to go on with, no chat: one message of the role `document`, no template."""
    variant: int = 0
    """Which of several instruction templates was drawn."""

    def to_dicts(self) -> list[dict[str, Any]]:
        """The messages as chat templates expect them."""
        return [message.to_dict() for message in self.messages]


@dataclass(frozen=True)
class Example:
    """One tokenised conversation."""

    input_ids: np.ndarray
    """int32 [length]; for sequence-to-sequence models source + target."""
    loss_mask: np.ndarray
    """bool [length]: True = this token is a target; not shifted. Causal: `loss_mask[0]` is always False."""
    control_tokens_encoded: int = 0
    """Control tokens spelled in content that became ordinary text."""
    lossy_characters: int = 0
    """Characters that this tokenizer cannot give back (only with `lossy_text: allow`, else such an example is refused)."""
