"""Plain text, every token of which is a target: for domain adaptation."""

from collections.abc import Collection
from typing import Any

from dstune.data import turns
from dstune.data.conversation import Conversation, Refused
from dstune.data.formats.record import Parts, Reader, listed


def document(keys: Collection[str]) -> Reader:
    """How to read a record's `text`. Raises Refused where there is none."""
    if "text" not in keys:
        raise Refused(
            "unknown_format", f"the keys {listed(keys)}; expected `text`, or name it by `columns: {{text: …}}`"
        )
    return _read


def _read(record: dict[str, Any]) -> Parts:
    content = turns.text(record["text"], "text")
    if not content or content.isspace():
        raise Refused("empty_document", "`text` is empty")
    return [Conversation((turns.plain("document", content),), document=True)]
