"""`turns: expand`: a conversation becomes one for every answer in it, cut behind it, that answer alone a target.

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
    messages = conversation.messages
    parts = [
        replace(
            conversation,
            messages=(
                *(replace(message, train=False) for message in messages[:number]),
                replace(messages[number], train=True),
            ),
        )
        for number in target_turns(conversation, train_on)
        if messages[number].role == "assistant"
    ]
    return parts or [conversation]
