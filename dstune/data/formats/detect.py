"""Which family a record belongs to, decided by its keys alone and remembered."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from dstune.data.conversation import Refused
from dstune.data.formats import preferences, tasks, trees
from dstune.data.formats.chat import Chat, chat_key
from dstune.data.formats.documents import document
from dstune.data.formats.pairs import Pair
from dstune.data.formats.record import Parts, Reader, Settings, listed, present
from dstune.data.turns import TurnNames

_MOST_KEYS = 1000
"""A vocabulary has every word as a key, `prompt` and `completion` too; no instruction has so many."""
_REMEMBERED_SETS = 256
_REMEMBERED_CHARACTERS = 4096
_WEIGHT_KEYS = ("loss_weight", "sample_weight")
_CHECKED_KEYS = (
    *("image", "images", "video", "videos", "audio", "audios", "objects", "chat_template_kwargs"),
    *_WEIGHT_KEYS,
    *("label", "is_correct"),
)
"""Columns that change what a record means: looked at in every record that has them."""


class Converter:
    """Conversations from the records of one source."""

    def __init__(self, format_: str, columns: Mapping[str, str], use: str | None, paths: str) -> None:
        tags = TurnNames.tags()
        self._columns = {ours: theirs for ours, theirs in columns.items() if ours not in tags}
        self._theirs = frozenset(self._columns.values())
        self._settings = Settings(format_, frozenset(self._columns), use, paths, TurnNames.of(columns))
        self._readers: dict[tuple[str, ...], Reader | Refused] = {}

    def __call__(self, record: dict[str, Any]) -> Parts:
        """The conversations in one record, a Refused for each part that is none. Raises Refused for the whole."""
        if self._columns:
            record = self._renamed(record)
        if None not in record.values():
            return self._read(record)
        given = {key: value for key, value in record.items() if value is not None}
        try:
            return self._read(given)  # tables, and files that were merged, spell out what is not there
        except Refused as refused:
            if refused.reason != "unknown_format":
                raise
        return self._read(record)

    def _read(self, record: dict[str, Any]) -> Parts:
        keys = tuple(record)
        reader = self._readers.get(keys)
        if reader is None:
            reader = self._remember(keys)
        if isinstance(reader, Refused):
            raise Refused(reader.reason, reader.detail)
        return reader(record)

    def _remember(self, keys: tuple[str, ...]) -> Reader | Refused:
        try:
            reader = choose(keys, self._settings)
        except Refused as refused:
            reader = refused
        if sum(map(len, keys)) <= _REMEMBERED_CHARACTERS:
            if len(self._readers) >= _REMEMBERED_SETS:
                self._readers.clear()
            self._readers[keys] = reader
        return reader

    def _renamed(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record under dstune's keys: `{prompt: question}` moves what the file calls `question`."""
        moved = {ours: record[theirs] for ours, theirs in self._columns.items() if theirs in record}
        if not moved:
            raise Refused(
                "missing_column", f"none of {listed(self._theirs)} in a record with the keys {listed(record)}"
            )
        kept = {key: item for key, item in record.items() if key not in self._theirs}
        return {**kept, **moved}


def choose(keys: Collection[str], settings: Settings) -> Reader:
    """How records with these keys are read. Raises Refused where that cannot be told."""
    if len(keys) > _MOST_KEYS:
        raise Refused("unknown_format", f"a record of {len(keys)} keys: {listed(keys)}")
    reader = _family(keys, settings)
    checked = present(keys, _CHECKED_KEYS)
    return partial(_checked, checked, settings, reader) if checked else reader


def _checked(keys: tuple[str, ...], settings: Settings, reader: Reader, record: dict[str, Any]) -> Parts:
    for key in keys:
        value = record[key]
        if key == "label":
            preferences.refuse_undesired(value, settings)
        elif key == "is_correct":
            if value is False:
                raise Refused("rejected_answer", "`is_correct` is false: a wrong answer")
        elif key in _WEIGHT_KEYS:
            if value != 1:
                raise Refused("unsupported_weight", f"`{key}` is {str(value)[:40]!r}; repeat the source instead")
        elif value:
            aside = f"set it aside by `columns: {{ignored: {key}}}` if the text is whole without it"
            raise Refused("unsupported_column", f"`{key}` changes what is learnt, and dstune tunes on text; {aside}")
    return reader(record)


def _family(keys: Collection[str], settings: Settings) -> Reader:
    """Readers from the surest signs to the least sure."""
    match settings.format:
        case "documents":
            return document(keys)
        case "oasst":
            return trees.tree(keys, settings.paths)
        case "messages" | "sharegpt" if not preferences.is_preference(keys, settings):
            return _chat(keys, settings) or _none(keys, "`messages` or `conversations`")
        case "natural_instructions":
            return tasks.natural_instructions(keys) or _none(keys, "`Definition` and `Instances`")
        case "self_instruct":
            return tasks.self_instruct(keys) or _none(keys, "`instruction` and `instances`")
        case "auto" if trees.is_tree(keys):
            return trees.tree(keys, settings.paths)
        case _ if preferences.is_preference(keys, settings):
            return preferences.preferred(keys, settings) or _family(*preferences.without_rejected(keys, settings))
        case "auto":
            found = tasks.natural_instructions(keys) or _chat(keys, settings) or tasks.self_instruct(keys)
            return found or Pair.of(keys, settings)
        case _:
            return Pair.of(keys, settings)


def _chat(keys: Collection[str], settings: Settings) -> Reader | None:
    key = chat_key(keys, settings)
    if not key:
        return None
    for pair in (("prompt", "completion"), ("instruction", "output")):
        if settings.format == "auto" and key not in settings.named and set(pair) <= set(keys):
            raise Refused("ambiguous_format", f"both `{key}` and {listed(pair)}; name one by `format`")
    return Chat.of(keys, key, settings)


def _none(keys: Collection[str], expected: str) -> Reader:
    raise Refused("unknown_format", f"no {expected} among the keys {listed(keys)}")
