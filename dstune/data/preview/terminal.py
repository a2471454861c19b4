"""A prepared directory in the terminal, for rich, and as plain values."""

import itertools
from collections.abc import Iterable
from typing import Any

from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from dstune.data.preview.survey import rejects, sample
from dstune.data.preview.text import many, segments, visible
from dstune.data.shards import Prepared

_TRAINED = "bold green"
_OTHER = "dim"
_REJECTS_SHOWN = 10


def preview(prepared: Prepared, tokenizer: Any, count: int, seed: int) -> Iterable[RenderableType]:
    """What `dstune preview` prints: a summary, sources, rejects, and `count` conversations drawn by `seed`."""
    yield _summary(prepared)
    yield _sources(prepared)
    first = list(itertools.islice(rejects(prepared), _REJECTS_SHOWN))
    if first:
        yield _rejects_table(first)
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
        "rejects": list(itertools.islice(rejects(prepared), _REJECTS_SHOWN)),
        "examples": examples,
    }


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
        "rows": f"{counts['rows']:,} of at most {settings['max_length']:,} tokens, {kind}",
        "fill": f"{counts['fill']:.2%} of the rows' room holds tokens",
        "tokens": f"{counts['tokens']:,}, of which {counts['supervised_tokens']:,} trained ({share:.1%})",
        "template": prepared.manifest["template"].get("name", settings["template"]),
        "train on": settings["train_on"],
        "validation": _held_out(held_out) if held_out else "none",
    }
    for name, value in lines.items():
        table.add_row(Text(name, "bold"), _text(value))
    return table


def _held_out(validation: Prepared) -> str:
    return f"{many(validation.num_examples, 'example')} in {many(validation.num_rows, 'row')}"


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


def _rejects_table(first: list[dict[str, Any]]) -> RenderableType:
    table = Table(
        Column("dropped", overflow="fold"),
        "reason",
        "detail",
        title="rejects.jsonl begins with",
        title_justify="left",
    )
    for reject in first:
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
    title = (
        f"example {number} · {prepared.origin(number)} · {many(len(example.input_ids), 'token')}, {trained:,} trained"
    )
    return Panel(body, title=_text(title), title_align="left")
