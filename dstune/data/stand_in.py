"""A built-in template in place of one without marks that writes the same.

Few tokenizers bring a template that says which tokens are the assistant's (`{% generation %}`). Qwen 3's has no marks and writes
an answer in three ways, by what follows it. The built-in template of the family writes the same text with marks: training goes by
that one, and the export keeps the other.
That they are the same is not taken from a name or a hash: both render conversations of every kind, and later each conversation
that is rendered at all (`Renderer.render`).
"""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

import jinja2

from dstune.data.conversation import Conversation, Message
from dstune.data.jinja_sandbox import ChatTemplate, TemplateLimit
from dstune.data.render import has_marks
from dstune.data.templates import Template, builtin_template, made_for

_CALL = {
    "type": "function",
    "id": "abcdefgh1",
    "function": {"name": "look", "arguments": {"at": 'the "sky"', "n": [2]}},
}
_AGAIN = {"type": "function", "id": "abcdefgh2", "function": {"name": "wait", "arguments": {}}}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
_S, _Q, _A, _R, _B = (
    Message("system", "Be brief. "),
    Message("user", " What is it?\n"),
    Message("assistant", "\nA thing. "),
    Message("user", "And that?"),
    Message("assistant", "Another."),
)
_TAGGED = Message("assistant", "<think>\nIt is a thing.\n</think>\n\nA thing.")
_LOOSE = Message("assistant", "<think>Hm, </think>a thing.")
_THOUGHT = Message("assistant", "Another.", reasoning="\nIt is another.\n")
_CALLED = Message("assistant", "", tool_calls=(_CALL,))
_CALLED_TWICE = Message("assistant", "Let me see.", tool_calls=(_CALL, _AGAIN), reasoning="I should look.")
_FOUND = Message("tool", '{"blue": true}\n', tool_call_id="abcdefgh1")
_DONE = Message("tool", "done", tool_call_id="abcdefgh2")
_PROBES = tuple(
    Conversation(messages, tools)
    for messages in (
        (_Q, _A),
        (_S, _Q, _A, _R, _B),
        (_Q, _TAGGED),
        (_Q, _LOOSE, _R, _TAGGED),
        (_S, _Q, _THOUGHT, _R, _THOUGHT),
        (_Q, _CALLED, _FOUND, _B),
        (_S, _Q, _CALLED_TWICE, _FOUND, _DONE, _THOUGHT, _R, _TAGGED),
        (_Q, _CALLED_TWICE, _FOUND, _CALLED, _DONE, _B),
        (_Q, _A, Message("user", "<tool_response>\n1\n</tool_response>"), _THOUGHT),
        (_Q, _TAGGED, _S, _R, _A, _R),
        (_Q, _R, _A, _B),
        (_A, _Q, _B),
    )
    for tools in ((), (_TOOL, _TOOL))
)


def stand_in(template: Template, tokenizer: Any, now: datetime) -> Template:
    """`template`, or where that has no marks the built-in one that writes the same with marks."""
    if has_marks(template.source) or template.tool_source is not None or template.num_variants:
        return template
    own, variables = ChatTemplate(template.source, now), tokenizer.special_tokens_map
    written = [_rendered(own, probe, variables) for probe in _PROBES]
    for name in made_for(tokenizer):
        builtin = builtin_template(name, tokenizer)
        marked = ChatTemplate(builtin.source, now)
        if all(_rendered(marked, probe, variables) == text for probe, text in zip(_PROBES, written, strict=True)):
            return replace(builtin, name=f"{template.name}, marked by {name}", own=template.source)
    return template


def _rendered(template: ChatTemplate, conversation: Conversation, variables: Mapping[str, Any]) -> str | None:
    """The text and the generation prompt's; None where the template refuses the conversation."""
    messages, tools = conversation.to_dicts(), list(conversation.tools) or None
    try:
        whole = template.render(messages, tools, variables).text
        return whole + "\0" + template.render(messages[:-1], tools, variables, True).text
    except (jinja2.TemplateError, TemplateLimit):
        return None
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError):
        return None  # what a template stumbles on
