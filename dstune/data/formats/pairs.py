"""Records of a question and its answer: alpaca, prompt and completion, P3, and their kin under other names."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from dstune.data import turns
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.formats.record import SYSTEM_KEYS, TOOLS_KEYS, Parts, Settings, listed, present, tools_of, with_system
from dstune.data.strict_json import kind, parse
from dstune.data.turns import TurnNames

PROMPT_KEYS = ("prompt", "instruction", "question", "query", "problem", "input", "inputs", "source")
ANSWER_KEYS = ("completion", "output", "response", "answer", "solution", "generation", "target", "targets")
_CONTEXT_KEYS = ("input", "context")
"""Beside an instruction these hold what it is about."""
_PART_OF_A_QUESTION = ("context", "passage", "choices", "options")
"""Beside a question without an instruction: how they belong together is for the user to say."""
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_PRETOKENIZED = ("inputs_pretokenized", "targets_pretokenized")
_USUAL = {
    "alpaca": (("instruction", "output"),),
    "prompt_completion": (("prompt", "completion"),),
    "p3": (_PRETOKENIZED, ("inputs", "targets"), ("prompt", "completion")),
}


@dataclass(frozen=True)
class Pair:
    """Reads the question under `prompt` and the answer under `answer`, with what stands beside them."""

    prompt: str
    answer: str
    contexts: tuple[str, ...] = ()
    history: bool = False
    reasoning: tuple[str, ...] = ()
    system: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    names: TurnNames = turns.USUAL_NAMES

    @classmethod
    def of(cls, keys: Collection[str], settings: Settings) -> "Pair":
        """Raises Refused where the keys do not tell which is which."""
        prompt, answer = _pair_keys(keys, settings)
        contexts = present(keys, _CONTEXT_KEYS) if prompt == "instruction" else ()
        parts = present(keys, _PART_OF_A_QUESTION)
        if parts and prompt != "instruction" and "prompt" not in settings.named and prompt not in settings.named:
            do = f"`columns: {{instruction: {prompt}, input: {parts[0]}}}` puts it below the question, {{prompt: {prompt}}} leaves it out"
            raise Refused("ambiguous_format", f"{listed(parts)} beside `{prompt}`; {do}")
        return cls(
            prompt=prompt,
            answer=answer,
            contexts=tuple(key for key in contexts if key != answer),
            history="history" in keys,
            reasoning=present(keys, _REASONING_KEYS),
            system=present(keys, SYSTEM_KEYS),
            tools=present(keys, TOOLS_KEYS),
            names=settings.names,
        )

    def __call__(self, record: dict[str, Any]) -> Parts:
        return [self.conversation(record)]

    def conversation(self, record: dict[str, Any]) -> Conversation:
        """The one conversation of the record."""
        prompt, reply = record[self.prompt], record[self.answer]
        if isinstance(prompt, list) or isinstance(reply, list | dict):
            messages = self._turns(record, prompt, reply)
        else:
            messages = _history(record.get("history")) if self.history else []
            messages.append(self.question(record))
            messages.append(turns.answer(reply, self.answer))
        if self.reasoning:
            messages[-1] = self._reasoned(record, messages[-1])
        if self.system:
            messages = with_system(record, self.system, messages)
        return turns.conversation(messages, tools_of(record, self.tools) if self.tools else ())

    def question(self, record: dict[str, Any]) -> Message:
        """The prompt; below an instruction, on a line of its own, what it is about."""
        prompt = record[self.prompt]
        prompt = "" if prompt is None else turns.text(prompt, self.prompt)
        context = None
        for key in self.contexts:
            value = record.get(key)
            if value is not None and value != "":
                if context is not None:
                    raise Refused("ambiguous_format", f"both {listed(self.contexts)} beside `instruction`")
                context = turns.text(value, key)
        question = prompt if context is None else f"{prompt}\n{context}" if prompt else context
        if not question or question.isspace():
            raise Refused("empty_prompt", f"`{self.prompt}` is empty")
        return turns.plain("user", question, context if prompt else None)

    def _turns(self, record: dict[str, Any], prompt: Any, reply: Any) -> list[Message]:
        """A conversation as prompt, of which nothing is learnt, and the turns to learn as completion."""
        if isinstance(prompt, list):
            asked = turns.to_messages(prompt, self.prompt, self.names)
            before = [replace(one, train=False) if one.role == "assistant" else one for one in asked]
        else:
            before = [self.question(record)]
        return [*before, *replies(reply, self.answer, self.names)]

    def _reasoned(self, record: dict[str, Any], answer: Message) -> Message:
        """The answer with the thoughts that a column of their own holds."""
        given = [key for key in self.reasoning if record.get(key) not in (None, "")]
        if not given:
            return answer
        if len(given) > 1 or answer.reasoning is not None:
            raise Refused("ambiguous_format", f"thoughts under {listed(given)}, and elsewhere; keep one")
        return replace(answer, reasoning=turns.text(record[given[0]], given[0]))


def replies(value: Any, where: str, names: TurnNames) -> list[Message]:
    """An answer: a text, one turn or a list of turns."""
    if isinstance(value, dict):
        return turns.to_messages([value], where, names)
    if isinstance(value, list) and not (value and all(isinstance(item, str) for item in value)):
        return turns.to_messages(value, where, names)
    return [turns.answer(value, where)]


def _pair_keys(keys: Collection[str], settings: Settings) -> tuple[str, str]:
    """The keys of question and answer: the ones that the user named, else the only ones that it can be."""
    for usual in _USUAL.get(settings.format, (_PRETOKENIZED,)):
        if set(usual) <= set(keys):
            return usual
    named = _one(settings.named, PROMPT_KEYS), _one(settings.named, ANSWER_KEYS)
    prompt = named[0] if named[0] in keys else _one(keys, PROMPT_KEYS)
    reply = named[1] if named[1] in keys else _one(keys, ANSWER_KEYS)
    if prompt and reply:
        return prompt, reply
    prompts, answers = present(keys, PROMPT_KEYS), present(keys, ANSWER_KEYS)
    if prompts and answers:
        named_by = "name them by `columns: {prompt: …, completion: …}`"
        raise Refused("ambiguous_format", f"question in {listed(prompts)}? answer in {listed(answers)}? {named_by}")
    expected = "`messages`, `conversations`, `instruction` and `output`, or `prompt` and `completion`"
    raise Refused("unknown_format", f"the keys {listed(keys)}; expected {expected}; rename by `columns`{_hint(keys)}")


def _hint(keys: Collection[str]) -> str:
    """What a record without a known pair of keys may be meant as."""
    if "chosen" in keys:
        return "; `use: chosen` takes the preferred answer"
    small = {key.lower(): key for key in keys if len(key) <= 40}
    prompts, answers = present(small, PROMPT_KEYS), present(small, ANSWER_KEYS)
    if prompts and answers:
        return f", perhaps {{prompt: {small[prompts[0]]}, completion: {small[answers[0]]}}}"
    return "; plain text is taken with `format: documents`" if "text" in keys else ""


def _one(keys: Collection[str], wanted: tuple[str, ...]) -> str:
    """The only one of `wanted` among the keys, empty where it is none or several; beside `instruction`, `input` is context."""
    found = present(keys, wanted)
    if "instruction" in found:
        found = tuple(key for key in found if key not in _CONTEXT_KEYS)
    return found[0] if len(found) == 1 else ""


def _history(value: Any) -> list[Message]:
    """Earlier turns as pairs of question and answer; a table's cell may spell them as JSON."""
    messages: list[Message] = []
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse(value.encode("utf-8"))
    if value in (None, ""):
        return messages
    if not isinstance(value, list):
        raise Refused("bad_turn", f"`history` is {kind(value)}, not a list of pairs")
    for number, pair in enumerate(value):
        where = f"history[{number}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise Refused("bad_turn", f"{where} is not a pair of question and answer")
        messages += [turns.question(pair[0], where), turns.answer(pair[1], where)]
    return messages
