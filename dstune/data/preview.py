"""A prepared directory for the eye: what came from where, what was dropped and why, and conversations with what is trained.

Whatever the data holds, nothing of it reaches the terminal but characters that can be seen: no escape sequence, no markup.
"""

import itertools
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from dstune import atomic
from dstune.data.order import permute
from dstune.data.shards import Prepared
from dstune.paths import PreparedPaths

_TRAINED = "bold green"
_OTHER = "dim"
_REJECTS_SHOWN = 10
_JOINERS = "\u200c\u200d"
"""Of the invisible characters these two belong to words and emoji."""


class Segment(NamedTuple):
    """A run of tokens that are all targets, or all not, as text."""

    text: str
    trained: bool


def visible(text: str) -> str:
    """`text` with every control, bidirectional and unassigned character spelled out: `\\x1b`, `\\u202e`; newlines stay."""
    return "".join(character if _is_shown(character) else _spelled(character) for character in text)


def _is_shown(character: str) -> bool:
    if character in "\n\t" or character in _JOINERS:
        return True
    return unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _spelled(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def segments(tokenizer: Any, input_ids: np.ndarray[Any, Any], loss_mask: np.ndarray[Any, Any]) -> list[Segment]:
    """The example's text in runs of trained and other tokens; control tokens are spelled.

    Each run is what the text grows by: a run alone would lose the space that some tokenizers drop at the beginning.
    """
    ends = [*(np.flatnonzero(loss_mask[1:] != loss_mask[:-1]) + 1).tolist(), len(input_ids)]
    found: list[Segment] = []
    start, before = 0, ""
    for end in ends:
        whole = _decode(tokenizer, input_ids[:end])
        text = whole[len(before) :] if whole.startswith(before) else _decode(tokenizer, input_ids[start:end])
        found.append(Segment(text, bool(loss_mask[start])))
        start, before = end, whole
    return found


def _decode(tokenizer: Any, input_ids: np.ndarray[Any, Any]) -> str:
    return str(tokenizer.decode(input_ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def sample(prepared: Prepared, count: int, seed: int) -> list[int]:
    """`count` different example numbers drawn by `seed`; all of them where there are not so many."""
    count = max(0, min(count, prepared.num_examples))
    return permute(seed, 0, prepared.num_examples, np.arange(count)).tolist()


def preview(prepared: Prepared, tokenizer: Any, count: int, seed: int) -> Iterable[RenderableType]:
    """What `dstune preview` prints: a summary, sources, rejects, and `count` conversations drawn by `seed`."""
    yield _summary(prepared)
    yield _sources(prepared)
    rejects = list(itertools.islice(_rejects(prepared), _REJECTS_SHOWN))
    if rejects:
        yield _rejects_table(rejects)
    for number in sample(prepared, count, seed):
        yield _conversation(prepared, tokenizer, number)


def preview_json(prepared: Prepared, tokenizer: Any, count: int, seed: int) -> dict[str, Any]:
    """The same as plain values; texts as they are in the data."""
    manifest = prepared.manifest
    examples: list[dict[str, Any]] = []
    for number in sample(prepared, count, seed):
        example = prepared.example(number)
        examples.append(
            {
                "example": number,
                "file": manifest["sources"][example.source]["path"],
                "line": example.line,
                "part": example.part,
                "tokens": len(example.input_ids),
                "supervised_tokens": int(example.loss_mask.sum()),
                "segments": [part._asdict() for part in segments(tokenizer, example.input_ids, example.loss_mask)],
            }
        )
    held_out = prepared.validation()
    keys = ("counts", "settings", "tokenizer", "template", "sources", "source_settings")
    return {
        "prepared": str(prepared.root),
        **{key: manifest[key] for key in keys},
        "validation": held_out.manifest["counts"] if held_out else None,
        "rejects": list(itertools.islice(_rejects(prepared), _REJECTS_SHOWN)),
        "examples": examples,
    }


def _rejects(prepared: Prepared) -> Iterator[dict[str, Any]]:
    yield from atomic.read_json_lines(PreparedPaths(prepared.root).rejects)


def _text(value: object, style: str = "") -> Text:
    return Text(visible(str(value)), style)


def _number(value: int) -> Text:
    return Text(f"{value:,}", justify="right")


def _summary(prepared: Prepared) -> RenderableType:
    counts, settings = prepared.manifest["counts"], prepared.manifest["settings"]
    table = Table.grid(padding=(0, 2))
    held_out = prepared.validation()
    kind = "packed" if settings["packing"] else "one example a row"
    share = counts["supervised_tokens"] / max(1, counts["tokens"])
    lines = {
        "prepared": prepared.root,
        "examples": f"{counts['examples']:,} ({counts['epoch_examples']:,} an epoch)",
        "rows": f"{counts['rows']:,} of at most {settings['max_length']:,} tokens, {kind}, {counts['fill']:.2%} full",
        "tokens": f"{counts['tokens']:,}, of which {counts['supervised_tokens']:,} trained ({share:.1%})",
        "template": prepared.manifest["template"].get("name", settings["template"]),
        "train on": settings["train_on"],
        "validation": f"{held_out.num_examples:,} examples in {held_out.num_rows:,} rows" if held_out else "none",
    }
    for name, value in lines.items():
        table.add_row(Text(name, "bold"), _text(value))
    return table


def _sources(prepared: Prepared) -> RenderableType:
    table = Table(Column("file", overflow="fold"), "records", "used", "conversations", "kept", "here", "dropped")
    for file in prepared.manifest["sources"]:
        records, made = file["records"], file["conversations"]
        reasons = [*records["dropped"].items(), *made["dropped"].items()]
        notes = [f"{count:,} {reason}" for reason, count in reasons]
        notes += [
            f"{file[key]:,} {key.replace('_', ' ')}"
            for key in ("control_tokens_encoded", "lossy_examples")
            if file[key]
        ]
        notes += [f"{made['truncated']:,} cut"] if made["truncated"] else []
        numbers = (records["read"], records["used"], made["made"], made["kept"], file["examples"])
        table.add_row(_text(file["path"]), *map(_number, numbers), _text("\n".join(notes)))
    return table


def _rejects_table(rejects: list[dict[str, Any]]) -> RenderableType:
    table = Table(
        Column("dropped", overflow="fold"),
        "reason",
        "detail",
        title=f"the first {len(rejects)} of rejects.jsonl",
        title_justify="left",
    )
    for reject in rejects:
        part = f" part {reject['part']}" if reject["part"] else ""
        table.add_row(
            _text(f"{reject['file']}:{reject['line']}{part}"), _text(reject["reason"]), _text(reject["detail"][:200])
        )
    return table


def _conversation(prepared: Prepared, tokenizer: Any, number: int) -> RenderableType:
    """Trained text is coloured, and stands in ⟦ ⟧ for eyes and files without colour."""
    example = prepared.example(number)
    body = Text()
    for part in segments(tokenizer, example.input_ids, example.loss_mask):
        if part.trained:
            body.append("⟦", _OTHER).append(visible(part.text), _TRAINED).append("⟧", _OTHER)
        else:
            body.append(visible(part.text), _OTHER)
    trained = int(example.loss_mask.sum())
    title = f"example {number} · {prepared.origin(number)} · {len(example.input_ids)} tokens, {trained} trained"
    return Panel(body, title=_text(title), title_align="left")
