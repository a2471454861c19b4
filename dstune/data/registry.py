"""LLaMA-Factory's `dataset_info.json`: what one of its entries says of a data set, in the words of a source of dstune's."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstune.config.schema import Source
from dstune.data.conversation import Refused
from dstune.data.strict_json import kind, parse_object
from dstune.errors import ConfigError, Problem

_FILE_NAME = "dataset_info.json"
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
_TAKEN = ("messages", "system", "tools", "history", "chosen", "rejected", "images", "videos", "audios")
"""Columns that are called the same here."""
_DEFAULTS = {"sharegpt": {"messages": "conversations"}, "openai": {"messages": "messages"}, "alpaca": {}}
_OPENAI_TAGS = {"role_tag": "role", "content_tag": "content"}


def file_of(source: Source, root: Path) -> Path | None:
    """The registry that a source names: the file or its directory; None where it is none. Raises ConfigError."""
    path = root / _FILE_NAME if source.entry is not None and root.is_dir() else root
    if path.is_file() and (source.entry is not None or path.name == _FILE_NAME):
        return path
    if source.entry is not None:
        came = f"no registry there, and `entry: {source.entry}`"
        raise ConfigError(Problem(source.path, came, f"a {_FILE_NAME}, or the directory that holds it"))
    return None


def resolve(source: Source, path: Path, written: str) -> Source:
    """The source that the entry `source.entry` of the registry at `path` describes; what the run file says goes before it.

    `num_samples` becomes `limit`: that many from the top. Raises ConfigError for an entry that there is not, or cannot be read.
    """
    entries = _read(path, written)
    if source.entry is None:
        came = f"a registry of {len(entries)} data sets"
        raise ConfigError(Problem(written, came, do=f"choose one by `entry:`, for instance {_some(entries)}"))
    entry = entries.get(source.entry)
    if not isinstance(entry, dict):
        near = difflib.get_close_matches(source.entry, entries, 1)
        do = f"did you mean {near[0]!r}?" if near else f"there are {_some(entries)}"
        raise ConfigError(Problem(written, f"no entry {source.entry!r}", do=do))
    where = f"{written} entry {source.entry}"
    format_, columns = _format(entry, where)
    limits = [limit for limit in (source.limit, _number(entry, where)) if limit is not None]
    return source.model_copy(
        update={
            "path": _path(entry, where, written if Path(written).name == path.name else f"{written}/{path.name}"),
            "entry": None,
            "format": format_ if source.format == "auto" else source.format,
            "columns": {**columns, **source.columns},
            "split": source.split or _text(entry, "split", where),
            "subset": source.subset or (None if entry.get("file_name") else _text(entry, "subset", where)),
            "limit": min(limits) if limits else None,
        }
    )


def _read(path: Path, written: str) -> Mapping[str, Any]:
    try:
        return parse_object(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except Refused as refused:
        raise ConfigError(
            Problem(written, f"not a registry: {refused}", "an object with an entry for each data set")
        ) from None


def _some(entries: Mapping[str, Any]) -> str:
    names = [name[:60] for name in entries]
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def _path(entry: Mapping[str, Any], where: str, written: str) -> str:
    """The data's own path: a file beside the registry, an address, or a hub id."""
    if name := _text(entry, "file_name", where):
        return str(Path(written).parent / name)
    if address := _text(entry, "cloud_file_name", where):
        return address
    if _text(entry, "folder", where):
        raise ConfigError(Problem(where, "`folder` of a hub id", do="name the hub id and its `subset` as a source"))
    if repository := _text(entry, "hf_hub_url", where):
        return repository if "/" in repository else f"hf://datasets/{repository}"
    elsewhere = [key for key in ("ms_hub_url", "om_hub_url", "script_url") if key in entry]
    came = f"only {', '.join(elsewhere)}" if elsewhere else "no file_name"
    raise ConfigError(
        Problem(where, came, "file_name, hf_hub_url or cloud_file_name", "fetch the data and name its file")
    )


def _format(entry: Mapping[str, Any], where: str) -> tuple[str, dict[str, str]]:
    """dstune's format and columns for the entry's `formatting`, `columns`, `tags` and `ranking`."""
    formatting = _text(entry, "formatting", where) or "alpaca"
    if formatting not in _DEFAULTS:
        raise ConfigError(Problem(where, f"formatting {formatting!r}", " or ".join(_DEFAULTS)))
    theirs = _strings(entry, "columns", where)
    columns = {**_DEFAULTS[formatting], **{key: theirs[key] for key in _TAKEN if key in theirs}}
    if "kto_tag" in theirs:
        columns["label"] = theirs["kto_tag"]
    if formatting != "alpaca":
        tags = {**(_OPENAI_TAGS if formatting == "openai" else {}), **_strings(entry, "tags", where)}
        return "preference" if entry.get("ranking") else "sharegpt", {**columns, **tags}
    if "prompt" in theirs and not theirs.keys() & {"response", "chosen", "kto_tag"}:
        return "documents", {"text": theirs["prompt"]}
    columns |= {ours: theirs[key] for key, ours in _ALPACA.items() if key in theirs}
    return "preference" if entry.get("ranking") else "alpaca", columns


def _text(entry: Mapping[str, Any], key: str, where: str) -> str | None:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(Problem(where, f"{key} is {kind(value)}", "a string"))
    return value or None


def _strings(entry: Mapping[str, Any], key: str, where: str) -> dict[str, str]:
    value = entry.get(key, {})
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise ConfigError(Problem(where, f"{key} is {kind(value)}", "an object of strings"))
    return value


def _number(entry: Mapping[str, Any], where: str) -> int | None:
    value = entry.get("num_samples")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(Problem(where, f"num_samples is {value!r}", "a number of records"))
    return value
