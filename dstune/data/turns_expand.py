"""`turns: expand`: a conversation becomes one for every answer in it, cut behind it, that answer alone a target
(and of the turns before it those that the file weighs itself, each once).

Templates that leave out what earlier answers thought (Qwen 3, DeepSeek R1) show every answer this way with its own thoughts and
without those before it: as the model will have written it.
"""

from dataclasses import replace

from dstune.data.conversation import Conversation
from dstune.data.targets import TrainOn, target_turns


def expand(conversation: Conversation, train_on: TrainOn = "assistant") -> list[Conversation]:
    """The conversation's targets one by one; the conversation itself where there is none, or it is a document."""
    if conversation.document:
        return [conversation]
    parts: list[Conversation] = []
    learned = -1
    for number in target_turns(conversation, train_on):
        if conversation.messages[number].role == "assistant":
            parts.append(_up_to(conversation, number, learned))
            learned = number
    return parts or [conversation]


def _up_to(conversation: Conversation, answer: int, learned: int) -> Conversation:
    """The conversation up to its `answer`, with the questions behind the answer `learned` before that the file itself weighs."""
    messages = [
        message if number > learned and message.role != "assistant" else replace(message, train=False)
        for number, message in enumerate(conversation.messages[:answer])
    ]
    return replace(conversation, messages=(*messages, replace(conversation.messages[answer], train=True)))
