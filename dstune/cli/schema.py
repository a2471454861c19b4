"""JSON Schema of the run file, for editors that complete and check YAML; and the cleaning steps, for people."""

import argparse
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from dstune.cli.output import emit, print_json

_COLUMNS = 110


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", default="run", choices=("run", "site", "tasks"), help="which file (default: run)"
    )
    parser.add_argument("--cleaning", action="store_true", help="the steps of `data.clean` with their settings instead")


def run(args: argparse.Namespace) -> int:
    from dstune import api

    if args.cleaning:
        steps = api.cleaning_steps()
        emit(args, steps, _lines(steps))
    else:
        print_json(api.schema(args.file))
    return 0


def _lines(steps: dict[str, Any]) -> Iterator[str]:
    for name, step in steps.items():
        yield name
        yield _indented(step["description"], 2)
        for setting, schema in step["properties"].items():
            needed = setting in step.get("required", ())
            default = "must be given" if needed else f"default {json.dumps(schema['default'], ensure_ascii=False)}"
            yield _indented(f"{setting} ({default}){_choices(schema)}: {schema['description']}", 4)
        yield ""


def _choices(schema: dict[str, Any]) -> str:
    named = schema.get("enum") or schema.get("items", {}).get("enum")
    return f", of {', '.join(named)}" if named else ""


def _indented(text: str, columns: int) -> str:
    blank = " " * columns
    return textwrap.fill(" ".join(text.split()), _COLUMNS, initial_indent=blank, subsequent_indent=blank + "  ")
