"""What the READMEs tell to type exists, the run file they show loads, and both languages say the same."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from dstune import errors
from dstune.cli.main import COMMANDS
from dstune.config import recipes
from dstune.config.load import load_run
from dstune.config.presets import preset_names

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "README.zh.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def commands(page: str) -> list[list[str]]:
    """Every `dstune …` line of the shell blocks, as the shell would split it, with the one variable put in."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    eight = next(line for line in lines if line.startswith("eight=")).partition("=")[2].strip('"')
    return [
        shlex.split(line.replace("$eight", eight), comments=True)[1:] for line in lines if line.startswith("dstune ")
    ]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses(page: str) -> None:
    found = commands(page)
    assert len(found) > 12
    for name, *words in found:
        assert name in COMMANDS
        parser = argparse.ArgumentParser(prog=name, exit_on_error=False, allow_abbrev=False)
        parser.add_argument("--json", action="store_true")
        importlib.import_module(f"dstune.cli.{name}").add_arguments(parser)
        parser.parse_intermixed_args(words)


@pytest.mark.parametrize("page", PAGES)
def test_the_run_file_loads_with_the_overrides_that_are_shown(page: str, tmp_path: Path) -> None:
    (shown,) = blocks(page, "yaml")
    (tmp_path / "run.yaml").write_text(shown, encoding="utf-8")
    assert load_run(tmp_path / "run.yaml").config.name == "support-bot"
    laptop = recipes.write(tmp_path / "laptop", "laptop")
    for name, *words in commands(page):
        if name in ("train", "submit"):
            load_run(laptop, [word for word in words if "=" in word])


@pytest.mark.parametrize("page", PAGES)
def test_presets_and_exit_statuses_are_all_told(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `(zero[\w+-]+)` \|", text, re.M))
    assert told == set(preset_names())
    statuses = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert {int(number) for number in re.findall(r"^\| (\d+) \|", text, re.M)} == statuses


def test_both_languages_show_the_same_commands() -> None:
    assert commands("README.md") == commands("README.zh.md")


def test_tools_that_are_named_exist() -> None:
    for page in PAGES:
        for tool in re.findall(r"\./(tools/\w+)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / tool).stat().st_mode & 0o111, f"{tool} is not executable"
