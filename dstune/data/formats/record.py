"""What every family needs: its settings, and the parts of a record that stand beside the turns."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from dstune.data import calls, turns
from dstune.data.conversation import Conversation, Message, Refused
from dstune.data.turns import TurnNames

Parts = list[Conversation | Refused]
Reader = Callable[[dict[str, Any]], Parts]
"""The conversations of a record whose keys are known; raises Refused where the whole record is none."""

SYSTEM_KEYS = ("system", "system_prompt")
TOOLS_KEYS = ("tools", "functions")


@dataclass(frozen=True)
class Settings:
    """What the run file says of a source."""

    format: str
    named: frozenset[str]
    """The columns that the user names, in our words."""
    use: str | None
    paths: str
    names: TurnNames


def listed(keys: Iterable[str]) -> str:
    """Keys for a message, at most twenty of them."""
    names = [repr(key[:40]) for key in keys]
    return ", ".join(names[:20]) + (", …" if len(names) > 20 else "") if names else "(none)"


def present(keys: Collection[str], wanted: Iterable[str]) -> tuple[str, ...]:
    """Those of `wanted` that are among `keys`, in their order."""
    return tuple(key for key in wanted if key in keys)


def with_system(record: dict[str, Any], keys: Iterable[str], messages: list[Message]) -> list[Message]:
    """`messages` behind the record's own `system` text, where it has one under one of `keys`."""
    given = [record[key] for key in keys if record.get(key) not in (None, "")]
    if not given:
        return messages
    if len(given) > 1:
        raise Refused("ambiguous_format", f"both {listed(keys)}; name one by `columns: {{system: …}}`")
    if messages and messages[0].role == "system":
        raise Refused("ambiguous_format", "a `system` column and a system turn; remove one of them")
    return [turns.plain("system", turns.text(given[0], "system")), *messages]


def tools_of(record: dict[str, Any], keys: Iterable[str]) -> tuple[dict[str, Any], ...]:
    """The tools under the first of `keys` that holds any."""
    return next((found for key in keys if (found := calls.tools(record.get(key)))), ())
