"""The floors of the house, what may be imported where, and how fast the light commands answer."""

import ast
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "dstune").rglob("*.py"))
LIGHT = [
    ["--help"],
    ["--version"],
    ["init", "--list"],
    ["schema"],
    ["train", "--help"],
    ["select", "--help"],
    ["export", "--help"],
    ["status", "no-such-run"],
    ["logs", "no-such-run"],
    ["stop", "no-such-run"],
    ["checkpoint", "list", "no-such-run"],
]
HEAVY = ("torch", "ray", "deepspeed", "transformers", "datasets", "pandas")


def test_the_floors() -> None:
    program = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"]
    linted = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def run_main(words: list[str], cwd: Path) -> dict[str, object]:
    """Run the command in a fresh interpreter: its status, and which heavy packages it imported."""
    program = (
        "import contextlib, io, json, sys\n"
        "from dstune.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    try:\n        status = main(sys.argv[1:])\n"
        "    except SystemExit as end:\n        status = end.code or 0\n"
        f"print(json.dumps({{'status': status, 'heavy': [m for m in {HEAVY!r} if m in sys.modules]}}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_a_light_command_imports_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    ended = run_main(words, tmp_path)
    assert ended["status"] == (2 if "no-such-run" in words else 0)
    assert ended["heavy"] == []


def test_help_answers_at_once() -> None:
    """In processor seconds, which are what it takes on a machine that has a core to spare, however busy this one is."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        program = [sys.executable, "-m", "dstune.cli.main", "--help"]
        subprocess.run(program, env=environment, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3


def third_party(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return {name for name in names if name not in sys.stdlib_module_names and name != "dstune"}


def test_every_import_is_a_declared_dependency() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = project.partition("dependencies = [")[2].partition("\n]")[0]
    declared = {name.replace("-", "_") for name in re.findall(r'^  "([A-Za-z0-9._-]+)', listed, re.M)}
    declared = {"ruamel" if name == "ruamel.yaml" else name for name in declared}
    imported = {name: path for path in SOURCES for name in third_party(path)}
    assert {name: str(path) for name, path in imported.items() if name not in declared} == {}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_reads_in_one_sitting(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 420
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 70, f"{node.name} is too long"


def test_no_room_is_a_drawer() -> None:
    drawers = {"utils", "helpers", "common", "misc", "manager"}
    assert not [str(path) for path in SOURCES if path.stem in drawers]
