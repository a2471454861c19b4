"""Which turns are targets: what the run's `train_on` says, and before it what the file itself says of a turn.

A turn that the file weighs 1 is a target and one that it weighs 0 is none, whatever `train_on` is. Of the others `assistant`
takes every answer, `last` the last answer, `all` everything and `weights` nothing.
"""

from collections.abc import Sequence
from typing import Literal

from dstune.data.conversation import Conversation, Refused
from dstune.data.render import Renderer, Span
from dstune.data.said import thinks

TrainOn = Literal["assistant", "last", "all", "weights"]


def target_turns(conversation: Conversation, train_on: TrainOn) -> list[int]:
    """The numbers of the messages whose turns are targets; with `all`, without its text between the turns."""
    messages = conversation.messages
    last = -1
    if train_on == "last":
        last = max((number for number, message in enumerate(messages) if message.role == "assistant"), default=-1)
    wanted: list[int] = []
    for number, message in enumerate(messages):
        usual = train_on == "all" or number == last or (train_on == "assistant" and message.role == "assistant")
        if usual if message.train is None else message.train:
            wanted.append(number)
    return wanted


def targets(
    conversation: Conversation, text: str, answers: Sequence[Span], train_on: TrainOn, renderer: Renderer, end: str
) -> tuple[tuple[int, int], ...]:
    """The characters of `text` that are targets, as (start, end), in order. `answers`: the assistant's spans; `end` ends a turn.

    Raises Refused where nothing is a target, a target cannot be told from its surroundings, or the template leaves out what an
    answer that is a target thinks: an answer without its reasons is not what the model writes when it is asked.
    """
    wanted = target_turns(conversation, train_on)
    whole = train_on == "all"
    turns = [number for number in range(len(conversation.messages)) if number not in wanted] if whole else wanted
    if not wanted:
        weights = "no turn has a weight above 0" if train_on == "weights" else "no answer to learn"
        raise Refused("no_supervised_tokens", f"{weights} in this conversation")
    spoken: dict[int, list[tuple[int, int]]] = {}
    for span in answers:
        spoken.setdefault(span.message, []).append((span.start, span.end))
    places: list[tuple[int, int]] = []
    for number in turns:
        if conversation.messages[number].role == "assistant":
            places += spoken.get(number, ())
        else:
            places.append(renderer.turn(conversation, text, number, end))
    places.sort()
    if whole:
        places = _between(places, len(text))
    thinking = [number for number in wanted if thinks(conversation.messages[number])]
    if thinking:
        shown = "".join(text[start:stop] for start, stop in places)
        for number in thinking:
            renderer.check_thoughts(conversation, number, shown)
    return tuple(places)


def _between(places: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int]]:
    """What `places` leave of a text."""
    borders = [0, *(border for place in places for border in place), length]
    return [(start, end) for start, end in zip(borders[::2], borders[1::2], strict=True) if start < end]
