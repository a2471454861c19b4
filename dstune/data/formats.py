"""What a record is (alpaca, sharegpt, messages, prompt and completion) and the conversations that it holds."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from dstune.config.schema import Source
from dstune.data import turns
from dstune.data.conversation import Conversation, Message, Refused

_CHAT_KEYS = ("messages", "conversations", "conversation")
_PROMPT_KEYS = ("prompt", "instruction", "question", "query", "input", "inputs", "source")
_ANSWER_KEYS = ("completion", "output", "response", "answer", "target", "targets")
_CONTEXT_KEYS = ("input", "context")
"""Beside an instruction these hold what it is about."""


def to_conversations(value: dict[str, Any], source: Source) -> list[Conversation]:
    """The conversations in one record, one but for nested instances. Raises Refused, with the record's keys where unsure."""
    record = _renamed(value, source.columns)
    if "chosen" in record and "rejected" in record:
        hint = "keep the good answer by `columns: {completion: chosen}`, or use a trainer for preferences"
        raise Refused("preference_data", f"`chosen` and `rejected` are preferences, not instructions; {hint}")
    if source.format in ("messages", "sharegpt"):
        return [_chat(record, _chat_key(record, record))]
    if "Instances" in record and "Definition" in record:
        return _natural_instructions(record)
    if source.format == "auto" and (key := _chat_key(record, None)):
        if {"prompt", "completion"} <= record.keys():
            raise Refused("ambiguous_format", f"both `{key}` and `prompt` with `completion`; name one by `format`")
        return [_chat(record, key)]
    if "instances" in record and "instruction" in record:
        return _instances(record)
    return [_pair(record, *_pair_keys(record, source))]


def _renamed(value: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The record under dstune's keys: `{prompt: question}` moves what the file calls `question`."""
    if not columns:
        return value
    moved = {ours: value[theirs] for ours, theirs in columns.items() if theirs in value}
    if not moved:
        raise Refused("missing_column", f"none of {_list(columns.values())} in a record with the keys {_list(value)}")
    kept = {key: item for key, item in value.items() if key not in columns.values()}
    return {**kept, **moved}


def _list(keys: Iterable[str]) -> str:
    names = [repr(key[:40]) for key in keys]
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "") if names else "(none)"


def _chat_key(record: dict[str, Any], required: dict[str, Any] | None) -> str:
    """The key that holds the turns; empty where there is none and none is required."""
    present = [key for key in _CHAT_KEYS if record.get(key) is not None]
    if len(present) > 1:
        raise Refused("ambiguous_format", f"turns under {_list(present)}; name one by `columns: {{messages: …}}`")
    if not present and required is not None:
        raise Refused("unknown_format", f"no `messages` or `conversations` among the keys {_list(required)}")
    return present[0] if present else ""


def _chat(record: dict[str, Any], key: str) -> Conversation:
    listed = record.get("tools", record.get("functions"))
    return Conversation((*_system(record, turns.to_messages(record[key], key)),), turns.tools(listed))


def _system(record: dict[str, Any], messages: list[Message]) -> list[Message]:
    """`messages` behind the record's own `system` text, where it has one."""
    system = record.get("system", record.get("system_prompt"))
    if system is None or system == "":
        return messages
    if messages and messages[0].role == "system":
        raise Refused("ambiguous_format", "a `system` column and a system turn; remove one of them")
    return [Message("system", turns.text(system, "system")), *messages]


def _pair_keys(record: dict[str, Any], source: Source) -> tuple[str, str]:
    """The keys of question and answer: the ones that the user named, else the only ones that it can be."""
    named = _one(source.columns, _PROMPT_KEYS), _one(source.columns, _ANSWER_KEYS)
    usual = {"alpaca": ("instruction", "output"), "prompt_completion": ("prompt", "completion")}.get(source.format)
    if usual and set(usual) <= record.keys():
        return usual
    prompt = named[0] if named[0] in record else _one(record, _PROMPT_KEYS)
    reply = named[1] if named[1] in record else _one(record, _ANSWER_KEYS)
    if prompt and reply:
        return prompt, reply
    prompts, replies = _present(record, _PROMPT_KEYS), _present(record, _ANSWER_KEYS)
    if prompts and replies:
        named_by = "name them by `columns: {prompt: …, completion: …}`"
        raise Refused("ambiguous_format", f"question in {_list(prompts)}? answer in {_list(replies)}? {named_by}")
    expected = "`messages`, `conversations`, `instruction` and `output`, or `prompt` and `completion`"
    raise Refused("unknown_format", f"the keys {_list(record)}; expected {expected}; rename by `columns`")


def _present(record: Iterable[str], keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if key in record]


def _one(record: Iterable[str], keys: tuple[str, ...]) -> str:
    """The only one of `keys` in the record, empty where it is none or several; beside `instruction`, `input` is context."""
    present = _present(record, keys)
    if "instruction" in present:
        present = [key for key in present if key not in _CONTEXT_KEYS]
    return present[0] if len(present) == 1 else ""


def _pair(record: dict[str, Any], prompt_key: str, answer_key: str) -> Conversation:
    prompt, reply = record[prompt_key], record[answer_key]
    listed = turns.tools(record.get("tools", record.get("functions")))
    if isinstance(prompt, list):  # a conversation as prompt, the turns to learn as completion
        before = [replace(message, train=False) for message in turns.to_messages(prompt, prompt_key)]
        after = turns.to_messages(reply, answer_key) if isinstance(reply, list) else [turns.answer(reply, answer_key)]
        return Conversation((*_system(record, [*before, *after]),), listed)
    messages = _history(record.get("history"))
    messages.append(_question(record, prompt_key))
    messages.append(turns.answer(reply, answer_key))
    return Conversation((*_system(record, messages),), listed)


def _question(record: dict[str, Any], key: str) -> Message:
    """The prompt; below an instruction, on a line of its own, what it is about."""
    prompt = turns.text("" if record[key] is None else record[key], key)
    context = None
    if key == "instruction":
        contexts = [name for name in _CONTEXT_KEYS if record.get(name) not in (None, "")]
        if len(contexts) > 1:
            raise Refused("ambiguous_format", f"both {_list(contexts)} beside `instruction`")
        context = turns.text(record[contexts[0]], contexts[0]) if contexts else None
    question = "\n".join(part for part in (prompt, context) if part)
    if not question.strip():
        raise Refused("empty_prompt", f"`{key}` is empty")
    return Message("user", question, context=context if prompt else None)


def _history(value: Any) -> list[Message]:
    """Earlier turns as pairs of question and answer."""
    messages: list[Message] = []
    if value in (None, ""):
        return messages
    if not isinstance(value, list):
        raise Refused("bad_turn", "`history` is not a list of pairs")
    for number, pair in enumerate(value):
        where = f"history[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refused("bad_turn", f"{where} is not a pair of question and answer")
        messages += [Message("user", turns.text(pair[0], where)), turns.answer(pair[1], where)]
    return messages


def _instances(record: dict[str, Any]) -> list[Conversation]:
    """An instruction with several inputs and outputs (`instances`, as in self-instruct's seed tasks)."""
    instances = record["instances"]
    if not isinstance(instances, list) or not all(isinstance(item, dict) and "output" in item for item in instances):
        raise Refused("unknown_format", "`instances` is not a list of objects with `output`")
    return [
        _pair({"instruction": record["instruction"], **instance}, "instruction", "output") for instance in instances
    ]


def _natural_instructions(record: dict[str, Any]) -> list[Conversation]:
    """A task of Natural Instructions: its definition over every instance, each listed answer a conversation of its own."""
    definition, instances = record["Definition"], record["Instances"]
    lines = definition if isinstance(definition, list) else [definition]
    instruction = "\n".join(turns.text(line, "Definition") for line in lines)
    if not isinstance(instances, list) or not all(isinstance(item, dict) and "output" in item for item in instances):
        raise Refused("unknown_format", "`Instances` is not a list of objects with `input` and `output`")
    pairs = [
        {"instruction": instruction, "input": instance.get("input"), "output": output}
        for instance in instances
        for output in (instance["output"] if isinstance(instance["output"], list) else [instance["output"]])
    ]
    return [_pair(pair, "instruction", "output") for pair in pairs]
