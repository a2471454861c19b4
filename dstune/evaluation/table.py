"""An evaluation's figures for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

_NOTED = {
    "truncated": "cut at max_new_tokens",
    "unparsable": "name no label",
    "unextracted": "without the pattern",
    "empty": "empty",
    "lossy_prompts": "prompts with characters unknown to the tokenizer",
    "refused": "records refused",
    "overlong": "too long, left out",
}


def table(results: Mapping[str, Any]) -> Table:
    """The dict that `evaluate` returns (or `results.json` read again), a line per figure."""
    title = escape(f"{results['model']}  ({results['dtype']}, {results['device']})")
    shown = Table(title=title, title_justify="left")
    shown.add_column("task", overflow="fold")
    shown.add_column("examples", justify="right")
    shown.add_column("metric")
    shown.add_column("value", justify="right")
    shown.add_column("95% interval", justify="right")
    shown.add_column("notes", overflow="fold")
    for task in results["tasks"]:
        first = True
        for name, estimate in task["metrics"].items():
            value, low, high = (_figure(estimate[key]) for key in ("value", "low", "high"))
            head = (escape(task["name"]), str(task["examples"])) if first else ("", "")
            shown.add_row(*head, name, value, f"{low} – {high}", _notes(task["counts"]) if first else "")
            first = False
        shown.add_section()
    return shown


def _figure(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1e5 else f"{value:.2e}"


def _notes(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[key]} {words}" for key, words in _NOTED.items() if counts.get(key))
