"""The outside of a conversation: what a template may go by apart from what is said, and where it ends."""

from dataclasses import replace

from dstune.data.conversation import Conversation, Message, Refused


def traits(message: Message) -> str:
    """What else a template may go by, but for what is said."""
    present = (message.content.strip(), message.name, message.tool_call_id, message.reasoning, message.input)
    return "".join("-" if value is None else "x" if value else "0" for value in present)


def harmless(conversation: Conversation) -> Conversation:
    """A conversation of the same shape with nothing in it."""
    return Conversation(
        tuple(
            Message(
                role=message.role,
                content="x" if message.content.strip() else "",
                name=None if message.name is None else "x",
                tool_call_id=None if message.tool_call_id is None else "x",
                reasoning=None if message.reasoning is None else "x",
                input="x" if message.input else message.input,
            )
            for message in conversation.messages
        ),
        variant=conversation.variant,
    )


def up_to_answer(conversation: Conversation) -> Conversation:
    """Without the turns after the last answer: they are neither source nor target."""
    messages = list(conversation.messages)
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        raise Refused("no_supervised_tokens", "no answer to learn in this conversation")
    return replace(conversation, messages=tuple(messages))
