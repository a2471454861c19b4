"""An evaluation's figures for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
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


def results_table(results: Mapping[str, Any]) -> Group:
    """The dict that `evaluate` returns (or `results.json` read again): a line per figure, and what to know about the answers."""
    title = escape(f"{results['model']}  ({results['dtype']}, {results['device']})")
    table = Table(title=title, title_justify="left")
    table.add_column("task", overflow="fold")
    for name in ("examples", "metric", "value", "95% interval"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    notes: list[str] = []
    for task in results["tasks"]:
        head = (escape(task["name"]), str(task["examples"]))
        for name, estimate in task["metrics"].items():
            value, low, high = (_figure(estimate[key]) for key in ("value", "low", "high"))
            table.add_row(*head, name, value, f"{low} – {high}")
            head = ("", "")
        table.add_section()
        notes += [f"{escape(task['name'])}: {found}"] if (found := _notes(task["counts"])) else []
    return Group(table, *notes, f"answers: {escape(str(results['outputs']))}")


def _figure(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1e5 else f"{value:.2e}"


def _notes(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[key]} {words}" for key, words in _NOTED.items() if counts.get(key))
