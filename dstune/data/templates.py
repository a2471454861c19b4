"""Which chat template a run uses: the tokenizer's own, a built-in one, a file, or instruction templates."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from dstune.data import instruction
from dstune.data.conversation import Message
from dstune.data.jinja_sandbox import ChatTemplate
from dstune.errors import ConfigError, Problem

_DIRECTORY = Path(__file__).parent / "chat_templates"


@dataclass(frozen=True)
class _Family:
    """What is peculiar to a built-in template, beside its text."""

    end: str = ""
    """The token that ends an answer; empty: the tokenizer's end of sequence."""
    markers: tuple[str, ...] = ()
    """Control tokens by which a model of this family is spoken to: a tokenizer that has all of them was made for it."""
    writes_bos: bool = False
    """The family's own template begins with the tokenizer's beginning of sequence."""
    file: str = ""
    """Another family's text, with other settings."""
    settings: str = ""
    """Jinja in front of the text."""


_CHATML = ("<|im_start|>", "<|im_end|>")
_FAMILIES = {
    "chatml": _Family("<|im_end|>", _CHATML),
    "llama2": _Family(writes_bos=True),
    "llama3": _Family("<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), True),
    "llama3.1": _Family(
        "<|eot_id|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        True,
        file="llama3",
        settings="{%- set DATED = true %}",
    ),
    "qwen2": _Family("<|im_end|>", _CHATML, settings="{%- set DEFAULT = 'You are a helpful assistant.' %}"),
    "qwen2.5": _Family(
        "<|im_end|>",
        _CHATML,
        file="qwen2",
        settings="{%- set DEFAULT = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}",
    ),
    "qwen3": _Family("<|im_end|>", _CHATML),
    "mistral": _Family(markers=("[INST]", "[/INST]"), writes_bos=True),
    "gemma": _Family("<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), True),
    "phi": _Family("<|end|>", ("<|user|>", "<|assistant|>", "<|end|>")),
    "phi4": _Family("<|im_end|>", ("<|im_start|>", "<|im_sep|>", "<|im_end|>")),
    "zephyr": _Family(),
    "vicuna": _Family(writes_bos=True),
    "deepseek": _Family("<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>"), True),
    "glm": _Family("<|user|>", ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>")),
    "alpaca": _Family(),
    "plain": _Family(),
}
BUILTIN = tuple(_FAMILIES)
_LIKELY_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "</s>",
)


@dataclass(frozen=True)
class Template:
    """A chat template's text; what an export writes beside the tokenizer."""

    name: str
    """`tokenizer`, a built-in name, or the file as written."""
    source: str
    tool_source: str | None = None
    """Used for conversations with tools, by tokenizers that have two templates."""
    markers: tuple[str, ...] = ()
    """Tokens that a built-in template's family has."""
    num_variants: int = 0
    """Of instruction templates: how many draws there are. 0: a chat template."""
    takes_input: bool = False
    """Of instruction templates: some have a place for the input apart from the instruction."""
    ends_in_blank: bool = False
    """Of instruction templates: the answer follows a blank, with which most tokenizers join its first word."""
    probes: tuple[tuple[Message, ...], ...] = ()
    """Of instruction templates: plain conversations of each kind that they take."""
    own: str | None = None
    """The template for which a built-in one stands in (`stand_in`): it must write the same."""

    def for_tools(self, tools: bool) -> str:
        """The text that transformers would take for a conversation with or without tools."""
        return self.tool_source if tools and self.tool_source is not None else self.source


def resolve_template(written: str | list[str], tokenizer: Any, base: Path, seq2seq: bool = False) -> Template:
    """The template that the run file's `data.template` names. Raises ConfigError, listing the choices, where there is none."""
    if isinstance(written, list):
        return _instruction(written, tokenizer, base, seq2seq)
    if written in BUILTIN:
        return builtin_template(written, tokenizer)
    if written == "auto":
        return _automatic(tokenizer, seq2seq)
    if instruction.is_text(written) or written.endswith(".txt"):
        return _instruction([written], tokenizer, base, seq2seq)
    path = base / Path(written).expanduser()
    if path.is_file():
        return _from_file(written, path)
    near = difflib.get_close_matches(written.lower(), ["auto", *BUILTIN], 1)
    do = f"did you mean {near[0]!r}?" if near and not written.endswith(".jinja") else f"looked for {path}"
    expected = f"auto, {', '.join(BUILTIN)}, a .jinja file, or texts with `{{instruction}}`"
    raise ConfigError(Problem("data.template", f"there is no template {written!r}", expected, do))


def _instruction(written: Sequence[str], tokenizer: Any, base: Path, seq2seq: bool) -> Template:
    """Instruction templates, each a text or a .txt file of texts, as one chat template."""
    texts: list[str] = []
    for one in written:
        path = base / Path(one).expanduser() if not instruction.is_text(one) else None
        if path is None:
            texts.append(one)
        elif path.is_file() and path.suffix == ".txt":
            try:
                texts += instruction.texts_of_file(path)
            except UnicodeDecodeError:
                raise ConfigError(Problem(one, "the instruction templates are not UTF-8")) from None
        else:
            expected = "in a list, texts with `{instruction}` and .txt files of such texts"
            raise ConfigError(Problem("data.template", repr(one), expected, f"looked for {path}"))
    if not texts:
        raise ConfigError(Problem("data.template", "an empty list", "texts with `{instruction}`"))
    kinds = instruction.groups(texts)
    head = _head(tokenizer, "instruction", _FAMILIES["plain"])
    return Template(
        f"{len(texts)} instruction template{'s' if len(texts) > 1 else ''}",
        f"{head}{{%- set SOURCE_END = {'END' if seq2seq else repr('')} %}}\n{instruction.jinja(texts)}",
        num_variants=instruction.num_variants(texts),
        takes_input=any(kind.input for kind in kinds),
        ends_in_blank=not seq2seq and any(text.endswith((" ", "\t")) for text in texts),
        probes=tuple(_probe(kind) for kind in kinds),
    )


def _probe(kind: instruction.Takes) -> tuple[Message, ...]:
    system = [Message("system", "Be brief.")] if kind.system else []
    question = Message("user", "Name a colour.", input="Grass and leaves." if kind.input else None)
    return (*system, question, Message("assistant", "A shade of green."))


def _from_file(written: str, path: Path) -> Template:
    try:
        template = Template(written, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ConfigError(Problem(written, "the template is not UTF-8")) from None
    check_syntax(template)
    return template


def check_syntax(template: Template) -> None:
    """Raises ConfigError with file and line where the template is not Jinja."""
    try:
        for source in {template.source, template.tool_source or template.source}:
            ChatTemplate(source, datetime.now())
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(Problem(f"{template.name}:{error.lineno}", f"the chat template is broken: {error}")) from None


def _automatic(tokenizer: Any, seq2seq: bool) -> Template:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        if "default" not in own:
            do = f"write the one you want into a .jinja file; the tokenizer has {', '.join(sorted(own))}"
            raise ConfigError(Problem("data.template", "the tokenizer has several templates and no default", do=do))
        template = Template("tokenizer", own["default"], own.get("tool_use"))
    elif own:
        template = Template("tokenizer", own)
    else:
        return builtin_template(_matching(tokenizer, seq2seq), tokenizer)
    check_syntax(template)
    return template


def _matching(tokenizer: Any, seq2seq: bool) -> str:
    """The built-in template that this tokenizer was made for."""
    if seq2seq:
        return "plain"
    if fitting := made_for(tokenizer):
        return fitting[0]
    expected = f"one of {', '.join(BUILTIN)}, a .jinja file, or texts with `{{instruction}}`"
    do = "a base model learns any of them; `template: chatml` is the usual choice"
    raise ConfigError(Problem("data.template", "`auto`, but the tokenizer brings no chat template", expected, do))


def made_for(tokenizer: Any) -> list[str]:
    """The built-in templates whose control tokens the tokenizer has."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return [name for name, family in _FAMILIES.items() if family.markers and added.issuperset(family.markers)]


def builtin_template(name: str, tokenizer: Any) -> Template:
    """A built-in template, complete in itself: its first line says what starts a text and ends a turn for this tokenizer.

    The end of a turn must be a token of its own to be learned and stopped at: the family's (`<|im_end|>`) where the
    tokenizer has it, else the tokenizer's end of sequence, else another end that it has. Raises ConfigError where it has none.
    """
    family = _FAMILIES[name]
    source = f"{_head(tokenizer, name, family)}{family.settings}\n{_text(family.file or name)}"
    return Template(name, source, markers=family.markers)


def _head(tokenizer: Any, name: str, family: _Family) -> str:
    """Jinja that says what begins a text (BOS) and what ends an answer (END)."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    end = family.end
    if end in added:
        written = repr(end)
    elif tokenizer.eos_token:
        written = "eos_token"
    elif likely := [token for token in _LIKELY_ENDS if token in added]:
        written = repr(likely[0])
    elif end:
        written = repr(end)
    else:
        came = f"template {name!r}: the tokenizer has no end of sequence, so the end of an answer could not be learned"
        raise ConfigError(
            Problem("data.template", came, "an `eos_token` in its tokenizer_config.json", "or `template: chatml`")
        )
    bos = "bos_token" if _begins(tokenizer, family) else repr("")
    return f"{{%- set BOS = {bos} %}}{{%- set END = {written} %}}"


def _begins(tokenizer: Any, family: _Family) -> bool:
    """Whether a text begins with the tokenizer's beginning of sequence: because the tokenizer puts it there, or the family does.

    A family's own does not count where the beginning is but another name for the end (GPT-2).
    """
    begin = tokenizer.bos_token_id
    if begin is None:
        return False
    return tokenizer("")["input_ids"][:1] == [begin] or (family.writes_bos and begin != tokenizer.eos_token_id)


@cache
def _text(name: str) -> str:
    return (_DIRECTORY / f"{name}.jinja").read_text(encoding="utf-8")
