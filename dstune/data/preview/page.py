"""A prepared directory as one HTML file: no script, no network, and nothing of the data becomes markup.

The page forbids itself everything but its own style sheet (Content-Security-Policy); the template engine escapes every value and
spells every invisible character (`_settled`), so that no place can forget it.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from dstune.data.order import permute
from dstune.data.preview import charts
from dstune.data.preview.conversation import conversations
from dstune.data.preview.findings import findings, share
from dstune.data.preview.survey import OVERLONG, Survey, chosen, reasons, survey
from dstune.data.preview.text import Marked, many, shortened, visible
from dstune.data.shards import Prepared
from dstune.errors import Problem, UsageError

_MARK = '<meta name="generator" content="dstune preview">'
"""Stands in the page's head: `require_writable` knows a page by it."""
_HEAD_BYTES = 1024
_FILES_SHOWN = 100
_REASONS_SHOWN = 40
_REJECTS_SHOWN = 5
_ROWS_DRAWN = 5
_MOST_DRAWN = 500
"""Conversations."""
_MOST_CHARACTERS = 300
"""Of a path, a template's text, a reason: the middle of what is longer is left out."""
_MASKS = {
    "all": "every token is a target",
    "generation": "by the template's own {% generation %} marks",
    "comparison": "by comparing what the template makes of each beginning, verified",
}


@dataclass(frozen=True)
class _File:
    """A row of the table of sources."""

    entry: Any
    """Of the manifest's `sources`."""
    setting: Any
    """Of the manifest's `source_settings`."""
    median: int | None
    """Tokens; None where nothing of it is here."""
    lengths: charts.Chart | None
    dropped: Sequence[tuple[int, str]]


def require_writable(path: Path, overwrite: bool) -> None:
    """Raise UsageError where no page can be written, or where that would replace a file that is none of ours."""
    if not path.parent.is_dir():
        raise UsageError(Problem(str(path), f"there is no directory {path.parent}", do="Make it first."))
    if not path.exists():
        return
    if not path.is_file():
        raise UsageError(Problem(str(path), "no regular file", "a file's name, for instance preview.html"))
    if not overwrite and not _is_page(path):
        do = "Give another name, or --overwrite to replace it."
        raise UsageError(Problem(str(path), "exists, and is no page of `dstune preview`", do=do))


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return _MARK.encode() in file.read(_HEAD_BYTES)


def html_page(prepared: Prepared, tokenizer: Any, count: int, seed: int) -> str:
    """The whole page: figures of all examples, and `count` conversations (at most 500) drawn by `seed` beside the extreme ones.

    A few megabytes at most, whatever the data holds.
    """
    count = max(0, min(count, _MOST_DRAWN, prepared.num_examples))
    marked = Marked.of(tokenizer)
    found = survey(prepared, marked)
    why_out = reasons(prepared, _REJECTS_SHOWN)
    style = _read("page.css")
    manifest = prepared.manifest
    held_out = prepared.validation()
    return (
        _environment()
        .get_template("page.html")
        .render(
            mark=Markup(_MARK),
            style=Markup(style),
            style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
            share=share,
            many=many,
            name=prepared.root.name,
            fingerprint=prepared.fingerprint,
            manifest=manifest,
            counts=manifest["counts"],
            settings=manifest["settings"],
            marks=_MASKS.get(manifest["encoding"]["mask"], manifest["encoding"]["mask"]),
            asked=_asked(manifest),
            validation=held_out.manifest["counts"] if held_out else None,
            findings=findings(prepared, found, why_out),
            files=_files(prepared, found),
            num_files=len(manifest["sources"]),
            reasons=why_out[:_REASONS_SHOWN],
            num_reasons=len(why_out),
            repeated=[reason for reason in why_out if reason.is_repetition],
            found=found,
            copies=[tuple(prepared.origin(number) for number in pair) for pair in found.copies[:_REJECTS_SHOWN]],
            quantiles=_quantiles(found),
            charts=_charts(prepared, found),
            rows=charts.row_pictures(prepared, _rows_drawn(prepared, seed)),
            conversations=conversations(prepared, tokenizer, marked, chosen(prepared, found, count, seed)),
            seed=seed,
            drawn=count,
        )
    )


def _asked(manifest: Any) -> list[tuple[str, str]]:
    """What the run file asks for beside the plain preparation, as JSON."""
    keys = {"Cleaning": "clean", "Deduplicate": "deduplicate", "Decontaminate": "decontaminate", "Turns": "turns"}
    found = {name: manifest["settings"].get(key) for name, key in keys.items()}
    found |= {"Mixing temperature": manifest["settings"].get("temperature"), "Selection": manifest.get("selection")}
    return [(name, json.dumps(value, ensure_ascii=False)) for name, value in found.items() if value]


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_settled,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["at"] = lambda value: f"{value:.3f}".rstrip("0").rstrip(".")
    return environment


def _settled(value: Any) -> Any:
    """What an expression of the template puts on the page: markup of ours as it is, all else as text that can be seen."""
    return value if isinstance(value, Markup) else shortened(visible(str(value)), _MOST_CHARACTERS)


def _read(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _quantiles(found: Survey) -> dict[str, int]:
    """Of the lengths, in tokens."""
    names = {"shortest": 0.0, "5% at most": 0.05, "half at most": 0.5, "95% at most": 0.95, "longest": 1.0}
    values = np.quantile(found.lengths, list(names.values()), method="inverted_cdf").astype(int).tolist()
    return dict(zip(names, values, strict=True))


def _overlong(manifest: Any) -> tuple[int, int]:
    """How many conversations were longer than a row, left out or cut, and the longest one's tokens."""
    made = [source["conversations"] for source in manifest["sources"]]
    count = sum(one["dropped"].get(OVERLONG, 0) + one["truncated"] for one in made)
    return count, max(source["longest"] for source in manifest["sources"])


def _charts(prepared: Prepared, found: Survey) -> dict[str, charts.Chart]:
    room = prepared.max_length
    count, longest = _overlong(prepared.manifest)
    beyond = (f"longer than max_length, up to {longest:,} tokens", count) if count else None
    sizes = prepared.row_sizes()
    return {
        "lengths": charts.of_counts("Tokens of an example", "example", found.lengths, "token", None, room, beyond),
        "shares": charts.of_shares("Trained share of an example's tokens", "example", found.shares),
        "fill": charts.of_fill("How full the rows are", prepared.rows_tokens, room),
        "sizes": charts.of_counts("Examples in a row", "row", sizes, "example"),
    }


def _files(prepared: Prepared, found: Survey) -> list[_File]:
    return [_file(prepared, found, number) for number in range(min(_FILES_SHOWN, len(prepared.manifest["sources"])))]


def _file(prepared: Prepared, found: Survey, number: int) -> _File:
    """The histograms of all files have the same bins, so that the eye can compare them."""
    entry = prepared.manifest["sources"][number]
    lengths = found.lengths[found.sources == number]
    low, high = int(found.lengths.min()), prepared.max_length
    dropped = [*entry["records"]["dropped"].items(), *entry["conversations"]["dropped"].items()]
    return _File(
        entry=entry,
        setting=prepared.manifest["source_settings"][entry["source"]],
        median=int(np.median(lengths)) if len(lengths) else None,
        lengths=charts.of_counts("", "example", lengths, "token", low, high) if len(lengths) else None,
        dropped=sorted(((count, name) for name, count in dropped), reverse=True),
    )


def _rows_drawn(prepared: Prepared, seed: int) -> list[int]:
    """The emptiest row, the one with the most examples, and some drawn by `seed`; none where a row is one example."""
    if not prepared.manifest["settings"]["packing"]:
        return []
    drawn = permute(seed, 0, prepared.num_rows, np.arange(min(_ROWS_DRAWN, prepared.num_rows))).tolist()
    extremes = [int(prepared.rows_tokens.argmin()), int(prepared.row_sizes().argmax())]
    return list(dict.fromkeys([*extremes, *drawn]))
