"""What `dstune select` shows: how much was taken from where, how the scores lie, and the examples on both sides of the line."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType
from rich.table import Column, Table
from rich.text import Text

from dstune.config.schema import RunConfig
from dstune.data.prepare import Report, prepare
from dstune.data.preview import visible
from dstune.data.shards import Prepared
from dstune.data.tokenizer_files import load_tokenizer
from dstune.selection.choose import Choice, Preparation, choose

_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_HEADS = ("least", "1/4", "half", "3/4", "most")
_SCORE = {"ifd": "ifd", "diversity": "distance", "random": None}
_CHARACTERS = 70


def explain(
    config: RunConfig,
    base: Path,
    count: int,
    progress: Report | None = None,
    preparation: Preparation = prepare,
) -> dict[str, Any]:
    """Choose, make the directory that a run trains on, and say what is in it: plain values, texts as they are.

    `count` examples of each side are shown. Raises what `choose` raises.
    """
    choice = choose(config, base, progress, preparation)
    return _described(choice, choice.prepared(config.name), load_tokenizer(config.model, base), max(0, count))


def _described(choice: Choice, prepared: Prepared, tokenizer: Any, count: int) -> dict[str, Any]:
    table, chosen = choice.table, choice.chosen
    order = np.argsort(table["rank"], kind="stable")
    taken, left = order[: choice.wanted][:count], order[choice.wanted :][:count]
    name = _SCORE[choice.select.by]
    return {
        "by": choice.select.by,
        "budget": choice.select.budget,
        "examples": choice.base.num_examples,
        "chosen": choice.wanted,
        "scores": str(choice.scores),
        "base": str(choice.base.root),
        "prepared": str(prepared.root),
        "counts": {"before": choice.base.manifest["counts"], "after": prepared.manifest["counts"]},
        "sources": _sources(choice),
        "score": {"name": name, **_sides(table[name], chosen)} if name else None,
        "answer_tokens": _sides(table["targets"].astype(np.float64), chosen),
        **({"ifd": _ifd(table, chosen, choice.select.max_ifd)} if choice.select.by == "ifd" else {}),
        "taken": [_example(choice, tokenizer, int(number), name) for number in taken],
        "left": [_example(choice, tokenizer, int(number), name) for number in left],
    }


def _sources(choice: Choice) -> list[dict[str, Any]]:
    files = choice.base.manifest["sources"]
    total = np.bincount(choice.table["source"], minlength=len(files)).tolist()
    taken = np.bincount(choice.table["source"][choice.chosen], minlength=len(files)).tolist()
    return [
        {"path": file["path"], "examples": every, "chosen": some}
        for file, every, some in zip(files, total, taken, strict=True)
    ]


def _sides(values: npt.NDArray[Any], chosen: npt.NDArray[np.bool_]) -> dict[str, list[float] | None]:
    """The quantiles 0, 1/4, 1/2, 3/4, 1 of what was chosen and of the rest; None where there is no number."""
    return {"chosen": _quantiles(values[chosen]), "rest": _quantiles(values[~chosen])}


def _quantiles(values: npt.NDArray[Any]) -> list[float] | None:
    known = values[~np.isnan(values)]
    return [round(float(value), 6) for value in np.quantile(known, _QUANTILES)] if len(known) else None


def _ifd(table: Mapping[str, npt.NDArray[Any]], chosen: npt.NDArray[np.bool_], most: float) -> dict[str, Any]:
    above, without = table["ifd"] > most, np.isnan(table["ifd"])
    return {
        "above": int(above.sum()),
        "above_chosen": int((above & chosen).sum()),
        "without": int(without.sum()),
        "without_chosen": int((without & chosen).sum()),
        "max_ifd": most,
    }


def _example(choice: Choice, tokenizer: Any, number: int, name: str | None) -> dict[str, Any]:
    stored = choice.base.example(number)
    value = float(choice.table[name][number]) if name else math.nan
    ids, mask = stored.input_ids, stored.loss_mask
    first = int(mask.argmax())
    return {
        "example": number,
        "file": choice.base.manifest["sources"][stored.source]["path"],
        "line": stored.line,
        "part": stored.part,
        "rank": int(choice.table["rank"][number]),
        "score": None if math.isnan(value) else value,
        "why": choice.why(number),
        "asked": _text(tokenizer, ids[:first]),
        "answered": _text(tokenizer, ids[first:][mask[first:]]),
    }


def _text(tokenizer: Any, ids: npt.NDArray[np.int32]) -> str:
    return str(tokenizer.backend_tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()


def show(found: Mapping[str, Any]) -> Iterable[RenderableType]:
    """`explain`'s values for rich."""
    yield _summary(found)
    yield _sources_table(found["sources"])
    yield _quantiles_table(found)
    for side, title in (("taken", "taken"), ("left", "left out")):
        if found[side]:
            yield _examples(f"{title}, the first {len(found[side])}", found[side])


def _summary(found: Mapping[str, Any]) -> RenderableType:
    before, after = found["counts"]["before"], found["counts"]["after"]
    table = Table.grid(padding=(0, 2))
    lines = {
        "taken": f"{found['chosen']:,} of {found['examples']:,} examples, by {found['by']}",
        "tokens": f"{after['tokens']:,} of {before['tokens']:,}, "
        f"of which {after['supervised_tokens']:,} of {before['supervised_tokens']:,} are trained",
        "epoch": f"{after['epoch_examples']:,} examples in {after['rows']:,} rows",
    }
    if "ifd" in found:
        ifd = found["ifd"]
        lines["ifd"] = (
            f"{ifd['above']:,} above {ifd['max_ifd']:g} ({ifd['above_chosen']:,} taken all the same), "
            f"{ifd['without']:,} without a score ({ifd['without_chosen']:,} taken)"
        )
    for name, value in lines.items():
        table.add_row(Text(name, "bold"), Text(value))
    return table


def _sources_table(sources: Sequence[Mapping[str, Any]]) -> RenderableType:
    table = Table(
        Column("file", overflow="fold"), *(Column(name, justify="right") for name in ("taken", "of", "share"))
    )
    for file in sources:
        share = f"{file['chosen'] / file['examples']:.1%}" if file["examples"] else ""
        table.add_row(Text(visible(file["path"])), f"{file['chosen']:,}", f"{file['examples']:,}", share)
    return table


def _quantiles_table(found: Mapping[str, Any]) -> RenderableType:
    table = Table("", "", *(Column(head, justify="right") for head in _HEADS))
    score = found["score"]
    rows = [(score["name"], score, ".4f")] if score else []
    for name, sides, form in [*rows, ("answer tokens", found["answer_tokens"], ",.0f")]:
        for side in ("chosen", "rest"):
            if sides[side]:
                table.add_row(name, side, *(format(value, form) for value in sides[side]))
    return table


def _examples(title: str, examples: Sequence[Mapping[str, Any]]) -> RenderableType:
    columns = [Column("rank", justify="right"), Column("file", overflow="fold"), "why", "asked", "answered"]
    table = Table(*columns, title=title, title_justify="left")
    for one in examples:
        part = f" part {one['part']}" if one["part"] else ""
        place = visible(f"{one['file']}:{one['line']}{part}")
        texts = (_end(one["asked"]), _beginning(one["answered"]))
        table.add_row(f"{one['rank']:,}", Text(place), Text(visible(one["why"])), *map(Text, texts))
    return table


def _line(text: str) -> str:
    return visible(" ".join(text.split()))


def _end(text: str) -> str:
    """A question's last words: templates begin with the same ones."""
    line = _line(text)
    return line if len(line) <= _CHARACTERS else "…" + line[-_CHARACTERS:]


def _beginning(text: str) -> str:
    line = _line(text)
    return line if len(line) <= _CHARACTERS else line[:_CHARACTERS] + "…"
