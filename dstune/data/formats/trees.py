"""Open-Assistant's message trees: a prompt, its replies, their replies …; the paths that end with an assistant's answer."""

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

from dstune.data import turns
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.formats.record import Parts, Reader, listed
from dstune.data.strict_json import kind

_TREE_KEYS = frozenset(("message_tree_id", "prompt"))
_ROW_KEYS = frozenset(("message_id", "parent_id", "role", "text"))
_STOPPED = ("aborted_low_grade", "halted_by_moderator", "prompt_lottery_waiting", "initial_prompt_review")
_ROLES = {"prompter": "user", "user": "user", "human": "user", "assistant": "assistant", "system": "system"}


def is_tree(keys: Collection[str]) -> bool:
    """Whether a record with these keys is a tree, or a message of one."""
    return set(keys) >= _TREE_KEYS or set(keys) >= _ROW_KEYS


def tree(keys: Collection[str], paths: str) -> Reader:
    """How to read a tree: `all` its paths or the `best`. Raises Refused where there is none."""
    if "prompt" in keys:
        return partial(_read, paths == "best")
    if set(keys) >= _ROW_KEYS:
        came = "one message of a tree, whose replies stand in other rows"
        raise Refused("unknown_format", f"{came}; take the file that holds whole trees (`…_trees.jsonl.gz`)")
    raise Refused("unknown_format", f"no `prompt` with its `replies` among the keys {listed(keys)}")


def _read(best: bool, record: dict[str, Any]) -> Parts:
    """The conversations of one tree. What no reviewer let through is refused, and the replies below it with it.

    All paths: one for each answer below which nobody answers again, so that every answer is in one and no path is the beginning
    of another; a user's words after the last answer are no part of any. `best`: one path, by `rank` (0 is the best) among replies,
    else by the `quality` that labellers gave, else by their order in the file; a reply that leads to no answer is passed over.
    """
    state = record.get("tree_state")
    if state in _STOPPED:
        raise Refused("unfinished_tree", f"its `tree_state` is {state!r}")
    root, refused = record.get("prompt"), list[Refused]()
    if not isinstance(root, dict):
        raise Refused("unknown_format", f"`prompt` is {kind(root)}; expected a message with `replies`")
    tree = _pruned(root, "prompt", refused)
    paths = [] if tree is None else [_best(tree)] if best else list(_all(tree))
    parts: Parts = [Conversation(tuple(path)) for path in paths if path]
    if not parts and not refused:
        raise Refused("no_answer", "no assistant answers in this tree")
    return [*parts, *refused]


class _Node:
    """A message and the replies to it that may be used."""

    def __init__(self, message: Message, replies: list["_Node"], merit: tuple[float, float]) -> None:
        self.message, self.replies, self.merit = message, replies, merit
        self.answers = message.role == "assistant" or any(reply.answers for reply in replies)
        """Whether an assistant speaks here or below."""


def _pruned(value: Any, place: str, refused: list[Refused]) -> _Node | None:
    """The tree from this message on, without what may not be used: that goes to `refused`."""
    if not isinstance(value, dict) or not isinstance(value.get("replies", []), list):
        raise Refused("bad_turn", f"{place} is {kind(value)}; expected a message with a list of `replies`")
    try:
        message = _message(value, place)
    except Refused as error:
        below = _size(value) - 1
        refused.append(Refused(error.reason, error.detail + (f"; {below} replies below it" if below else "")))
        return None
    replies = [
        node
        for number, reply in enumerate(value.get("replies", []))
        if (node := _pruned(reply, f"{place}.replies[{number}]", refused))
    ]
    return _Node(message, replies, _merit(value))


def _message(value: dict[str, Any], place: str) -> Message:
    named = f"{place} ({str(value.get('message_id', 'no id'))[:40]})"
    if value.get("deleted"):
        raise Refused("deleted_message", f"{named} was deleted")
    if "review_result" in value and value["review_result"] is not True:
        said = "rejected by its reviewers" if value["review_result"] is False else "not reviewed"
        raise Refused("not_reviewed", f"{named} was {said}")
    role = _ROLES.get(turns.text(value.get("role"), f"{named}.role"))
    if role is None:
        raise Refused("unknown_role", f"{named} has the role {value['role'][:40]!r}; expected prompter or assistant")
    content = turns.text(value.get("text"), f"{named}.text")
    if not content.strip():
        raise Refused("empty_answer" if role == "assistant" else "empty_prompt", f"{named} is empty")
    return turns.plain(role, content)


def _size(value: Any) -> int:
    replies = value.get("replies", []) if isinstance(value, dict) else []
    return 1 + (sum(map(_size, replies)) if isinstance(replies, list) else 0)


def _merit(value: dict[str, Any]) -> tuple[float, float]:
    """What replies to the same message are ordered by, the best first."""
    rank = value.get("rank")
    labels = value.get("labels")
    quality = labels.get("quality") if isinstance(labels, dict) else value.get("quality")
    score = quality.get("value") if isinstance(quality, dict) else quality
    return (
        rank if isinstance(rank, int | float) else float("inf"),
        -score if isinstance(score, int | float) else float("inf"),
    )


def _all(node: _Node) -> Iterator[list[Message]]:
    if not node.answers:
        return
    below = [reply for reply in node.replies if reply.answers]
    if not below:
        yield [node.message]
    for reply in below:
        for path in _all(reply):
            yield [node.message, *path]


def _best(node: _Node) -> list[Message]:
    path: list[Message] = []
    at: _Node | None = node if node.answers else None
    while at:
        path.append(at.message)
        at = min((reply for reply in at.replies if reply.answers), key=lambda reply: reply.merit, default=None)
    return path
