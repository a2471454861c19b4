"""Which turns are targets: what the run's `train_on` says, and before it what the file itself says of a turn.

A turn that the file weighs 1 is a target and one that it weighs 0 is none, whatever `train_on` is. Of the others `assistant`
takes every answer, `last` the last answer, `all` everything and `weights` nothing.
"""

from collections.abc import Sequence
from typing import Literal

from dstune.data.conversation import Conversation, Refused
from dstune.data.render import Renderer, Span

TrainOn = Literal["assistant", "last", "all", "weights"]


def target_turns(conversation: Conversation, train_on: TrainOn) -> list[int]:
    """The numbers of the messages whose turns are targets; with `all`, without its text between the turns."""
    answers = [number for number, message in enumerate(conversation.messages) if message.role == "assistant"]
    usual = {
        "assistant": frozenset(answers),
        "last": frozenset(answers[-1:]),
        "all": frozenset(range(len(conversation.messages))),
        "weights": frozenset[int](),
    }[train_on]
    said = [message.train for message in conversation.messages]
    return [number for number, train in enumerate(said) if (number in usual if train is None else train)]


def targets(
    conversation: Conversation, text: str, answers: Sequence[Span], train_on: TrainOn, renderer: Renderer, end: str
) -> tuple[tuple[int, int], ...]:
    """The characters of `text` that are targets, as (start, end), in order. `answers`: the assistant's spans; `end` ends a turn.

    Raises Refused where nothing is a target, a target cannot be told from its surroundings, or the template leaves out what an
    answer that is a target thinks: an answer without its reasons is not what the model writes when it is asked.
    """
    wanted = target_turns(conversation, train_on)
    whole = train_on == "all"
    turns = sorted({*range(len(conversation.messages))} - {*wanted}) if whole else wanted
    if not wanted:
        weights = "no turn has a weight above 0" if train_on == "weights" else "no answer to learn"
        raise Refused("no_supervised_tokens", f"{weights} in this conversation")
    places: list[tuple[int, int]] = []
    for number in turns:
        mine = [(span.start, span.end) for span in answers if span.message == number]
        if not mine and conversation.messages[number].role != "assistant":
            mine = [renderer.turn(conversation, text, number, end)]
        places += mine
    places.sort()
    if whole:
        places = _between(places, len(text))
    for number in wanted:
        renderer.check_thoughts(conversation, number, "".join(text[start:stop] for start, stop in places))
    return tuple(places)


def _between(places: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """What `places` leave of a text."""
    borders = [0, *(border for place in places for border in place), length]
    return [(start, end) for start, end in zip(borders[::2], borders[1::2], strict=True) if start < end]
