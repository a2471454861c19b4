"""`dstune chat`: a conversation with a model in the terminal, or with lines from a pipe."""

import contextlib
import importlib
import io
import json
import secrets
import sys
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from dstune.data.conversation import Conversation, Message, Refused
from dstune.errors import DataError, Problem
from dstune.generate import Settings, stream
from dstune.model.open import OpenedModel, open_model

_HELP = (
    "/reset forgets the conversation, /system TEXT starts a new one under that message, /exit or Ctrl-D ends, "
    "Ctrl-C stops an answer."
)
_PROMPT = "> "


@dataclass
class Talk:
    """One conversation and its model."""

    model: OpenedModel
    settings: Settings
    system: str | None = None
    history: list[Message] = field(default_factory=list)

    def ask(self, question: str) -> Generator[str]:
        """The answer in pieces. What was said becomes history, an answer that was broken off too; an unanswered question not.

        Raises DataError where the conversation no longer fits into the model, or the template refuses it.
        """
        asked = [*self.history, Message("user", question)]
        pieces: list[str] = []
        # contextlib.closing: a break (Ctrl-C among others) must stop the thread that generates.
        with contextlib.closing(stream(self.model, self._tokens(asked), self._settings(asked))) as answer:
            try:
                for piece in answer:
                    pieces.append(piece)
                    yield piece
            finally:
                if pieces:
                    self.history = [*asked, Message("assistant", "".join(pieces))]

    def reset(self) -> None:
        """Forget the conversation; the system message stays."""
        self.history = []

    def _tokens(self, messages: list[Message]) -> list[int]:
        head = [] if self.system is None else [Message("system", self.system)]
        (prompt,) = self.model.prompts([Conversation((*head, *messages))])
        if isinstance(prompt, Refused):
            raise DataError(Problem("", prompt.detail or prompt.reason))
        context = self.model.context
        room = context - (0 if self.model.seq2seq else 1) if context is not None else None
        if room is not None and len(prompt.ids) > room:
            raise DataError(
                Problem("", f"{len(prompt.ids)} tokens do not fit into the model's {context}", do="/reset forgets them")
            )
        return prompt.ids

    def _settings(self, messages: list[Message]) -> Settings:
        """The settings of this turn: a seed of its own, at most as many new tokens as there is room for."""
        settings = replace(self.settings, seed=self.settings.seed + len(messages))
        context = self.model.context
        if context is None or self.model.seq2seq:
            return settings
        room = context - len(self._tokens(messages))
        return replace(settings, max_new_tokens=min(settings.max_new_tokens, room))


def chat(
    model: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int | None = None,
    as_json: bool = False,
    questions: TextIO | None = None,
    answers: TextIO | None = None,
    **opening: Any,
) -> int:
    """Talk until the end of input; the exit status. `opening` goes to `open_model`.

    From a terminal: a prompt, `/` commands, Ctrl-C. From a pipe: a question per line, only answers on stdout, one conversation.
    `seed`: of sampled answers; default another one each time. `as_json`: one JSON document at the end, `{"model", "system",
    "messages"}`. Raises UsageError, RunFailed; from a pipe DataError where a question cannot be asked.
    """
    asks, says = questions or sys.stdin, answers or sys.stdout
    if isinstance(asks, io.TextIOWrapper):
        asks.reconfigure(errors="replace")
    drawn = secrets.randbits(32) if seed is None else seed
    settings = Settings(max_new_tokens=max_new_tokens, temperature=temperature, seed=drawn)
    talk = Talk(open_model(model, **opening), settings, system)
    if asks.isatty():
        _interactive(talk, says, sys.stderr if as_json else says)
    else:
        _piped(talk, asks, None if as_json else says)
    if as_json:
        messages = [message.to_dict() for message in talk.history]
        print(json.dumps({"model": model, "system": talk.system, "messages": messages}, ensure_ascii=False), file=says)
    return 0


def _interactive(talk: Talk, says: TextIO, shows: TextIO) -> None:
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() its line editing and history

    print(f"{printable(talk.model.name)} on {talk.model.device}, {talk.model.dtype}. {_HELP}", file=shows)
    while True:
        try:
            line = input(_PROMPT).strip()
        except EOFError:
            print(file=shows)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)", file=shows)
            continue
        if line == "/exit":
            return
        if not line:
            continue
        try:
            _turn(talk, line, shows)
        except KeyboardInterrupt:
            print(" [stopped]", file=shows)
        except DataError as error:
            print(f"not asked: {error}", file=shows)


def _piped(talk: Talk, asks: TextIO, shows: TextIO | None) -> None:
    for line in asks:
        if line.strip() == "/exit":
            return
        if line.strip():
            _turn(talk, line.strip(), shows)


def _turn(talk: Talk, line: str, shows: TextIO | None) -> None:
    """One line of the user's: a command or a question."""
    command, _, rest = line.partition(" ")
    if command == "/reset":
        talk.reset()
    elif command == "/system":
        talk.system = rest.strip() or None
        talk.reset()
    elif command == "/help":
        print(_HELP, file=sys.stderr)
    elif command.startswith("/") and command[1:].isalpha():
        print(f"no command {command}. {_HELP}", file=sys.stderr)
    else:
        _answer(talk, line, shows)


def _answer(talk: Talk, question: str, shows: TextIO | None) -> None:
    with contextlib.closing(talk.ask(question)) as answer:
        for piece in answer:
            if shows is not None:
                shows.write(printable(piece))
                shows.flush()
    if shows is not None:
        print(file=shows, flush=True)


def printable(text: str) -> str:
    """`text` without what a terminal would obey: control characters but line ends and tabs become visible.

    A model's `\\x1b[2J` would clear the screen, others retitle the window or type into the clipboard.
    """
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or not (code < 0x20 or 0x7F <= code < 0xA0):
        return character
    return "␡" if code == 0x7F else chr(0x2400 + code) if code < 0x20 else "\ufffd"
