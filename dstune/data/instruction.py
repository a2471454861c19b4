"""Instruction templates: plain texts with `{instruction}`, `{input}` and `{system}`, behind which the answer follows.

Of several texts each conversation gets one, drawn by the run's seed and what it says: the more ways to ask, the better a model
follows ways that it has not seen (Wei et al. 2022, "Finetuned Language Models Are Zero-Shot Learners"; Longpre et al. 2023, "The
Flan Collection"). The rules:

- A question is asked by a text that takes exactly what it has: one with an input by a text with `{input}`, one without by a text
  without it, and the same for `{system}` and the conversation's system text. So no text stands around nothing. Where no text
  takes what there is, the conversation is refused; only where no text at all takes `{input}` it stands below the instruction.
- In a conversation of several turns every question is asked this way, one behind the other; all that take the same have the same text.
- The answer follows the text at once and ends with the tokenizer's end of sequence.
- `{{input}}` is the word in braces. All other braces are what they are.

All texts become one chat template, which the export keeps: asked without `variant` it takes the first text that fits.
"""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from dstune.data.conversation import Conversation, Message, Refused
from dstune.errors import ConfigError, Problem

_PLACEHOLDERS = ("instruction", "input", "system")
_ANSWERS = ("output", "response", "answer", "completion", "target")
_PLACED = re.compile(r"\{\{(instruction|input|system)\}\}|\{(\w+)\}")
_SEPARATOR = re.compile(r"^---[ \t]*\n", re.MULTILINE)
_SOURCES = {"instruction": "message.content", "input": "message.input", "system": "system"}


class Takes(NamedTuple):
    """What a text takes beside the instruction."""

    input: bool
    system: bool

    def __str__(self) -> str:
        return " and ".join(f"`{{{name}}}`" for name, taken in self._asdict().items() if taken)


def is_text(written: str) -> bool:
    """Whether a run file's `data.template` is a text with placeholders, and no name or path."""
    return "\n" in written or "{" in written


def texts_of_file(path: Path) -> list[str]:
    """The texts of a file, one below the other with a line `---` between them; the newline before it and the file's last are not theirs."""
    whole = path.read_text(encoding="utf-8").removesuffix("\n") + "\n"
    return [text.removesuffix("\n") for text in _SEPARATOR.split(whole)]


def takes(text: str) -> Takes:
    """What `text` takes. Raises ConfigError where it has no `{instruction}`, or a placeholder that there is not."""
    named = [match.group(2) for match in _PLACED.finditer(text) if match.group(2)]
    shown = repr(text if len(text) <= 60 else text[:57] + "...")
    for name in named:
        near = difflib.get_close_matches(name, _PLACEHOLDERS, 1, cutoff=0.75)
        if name in _ANSWERS:
            do = "end the text where the answer begins: it follows by itself"
            raise ConfigError(Problem("data.template", f"`{{{name}}}` in the instruction template {shown}", do=do))
        if near and near[0] != name:
            do = f"did you mean `{{{near[0]}}}`?"
            raise ConfigError(Problem("data.template", f"`{{{name}}}` in the instruction template {shown}", do=do))
    if "instruction" not in named:
        expected = "a text with `{instruction}`, and where it is wanted `{input}` and `{system}`"
        raise ConfigError(Problem("data.template", f"the text {shown}", expected))
    return Takes("input" in named, "system" in named)


def groups(texts: Sequence[str]) -> dict[Takes, list[int]]:
    """The numbers of the texts that take the same. Raises ConfigError as `takes` does."""
    found: dict[Takes, list[int]] = {}
    for number, text in enumerate(texts):
        found.setdefault(takes(text), []).append(number)
    return found


def jinja(texts: Sequence[str]) -> str:
    """All texts as one chat template; `variant` says which, BOS and END what begins a conversation and ends an answer.

    SOURCE_END ends the last question, for sequence-to-sequence models. A message may hold its input as `input`.
    """
    numbered = {f"{int(kind.input)}{int(kind.system)}": numbers for kind, numbers in groups(texts).items()}
    branches = "\n".join(
        f"        {{%- {'elif' if number else 'if'} text == {number} %}}{{{{- {_expression(text)} }}}}"
        for number, text in enumerate(texts)
    )
    return f"""{{{{- BOS }}}}
{{%- set texts = {numbered!r} %}}
{{%- set first = messages[0] if messages[0].role in ['system', 'developer'] else none %}}
{{%- set system = first.content if first else '' %}}
{{%- if tools %}}{{{{ raise_exception('instruction templates have no place for tools') }}}}{{% endif %}}
{{%- for message in messages %}}
    {{%- if loop.first and first %}}
    {{%- elif message.role == 'user' %}}
        {{%- set fitting = texts[('1' if message.input else '0') + ('1' if system else '0')] %}}
        {{%- if not fitting %}}
            {{%- set has = ('an' if message.input else 'no') + ' input and ' + ('a' if system else 'no') + ' system text' %}}
            {{%- set places = (', `{{input}}`' if message.input else '') + (', `{{system}}`' if system else '') %}}
            {{%- set do = '; give `data.template` a text with `{{instruction}}`' + places %}}
            {{{{- raise_exception('no instruction template is for a question with ' + has + do) }}}}
        {{%- endif %}}
        {{%- set text = fitting[(variant | default(0)) % (fitting | length)] %}}
{branches}
        {{%- endif %}}
    {{%- elif message.role == 'assistant' %}}
        {{%- if loop.last %}}{{{{ SOURCE_END }}}}{{% endif %}}
        {{%- generation %}}
            {{%- if message.reasoning_content %}}{{{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}}}{{% endif %}}
            {{{{- message.content + END }}}}
        {{%- endgeneration %}}
    {{%- else %}}
        {{{{- raise_exception('instruction templates have no place for a turn of the role ' + message.role) }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}{{{{ SOURCE_END }}}}{{% endif %}}
"""


def _expression(text: str) -> str:
    """A text as Jinja writes it: `'Translate: ' + message.content`."""
    parts: list[str] = []
    at = 0
    literal = ""
    for match in _PLACED.finditer(text):
        doubled, single = match.groups()
        literal += text[at : match.start()]
        at = match.end()
        if single in _SOURCES:
            parts += [repr(literal), _SOURCES[single]]
            literal = ""
        else:
            literal += f"{{{doubled}}}" if doubled else match.group()
    return " + ".join(part for part in [*parts, repr(literal + text[at:])] if part != "''")


def num_variants(texts: Sequence[str]) -> int:
    """How many different draws there are: one number chooses among the texts of every kind."""
    return math.lcm(*(len(numbers) for numbers in groups(texts).values()))


def drawn(conversation: Conversation, variants: int, seed: int) -> int:
    """The conversation's draw, in [0, variants): by what it says and the seed alone."""
    if variants < 2:
        return 0
    said = json.dumps([seed, conversation.to_dicts()], sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(said.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % variants


def apart(conversation: Conversation) -> Conversation:
    """The conversation with each question's input apart from its instruction. Raises Refused where they cannot be told apart."""
    return replace(conversation, messages=tuple(map(_apart, conversation.messages)))


def _apart(message: Message) -> Message:
    if message.context is None:
        return message
    behind = "\n" + message.context
    if not message.content.endswith(behind):
        raise Refused("input_lost", "the question no longer ends with its input")
    return replace(message, content=message.content.removesuffix(behind), input=message.context, context=None)
