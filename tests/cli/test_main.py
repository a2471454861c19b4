"""The command's frame: help, typos, exit statuses, JSON, and what it must not import."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dstune.cli.main import COMMANDS, main


def dstune(*words: str, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "dstune.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)


def test_help_lists_every_command_and_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert len(text.splitlines()) <= 32


@pytest.mark.parametrize("name", COMMANDS)
def test_each_commands_help_fits_a_screen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) <= 40


def test_a_typo_names_its_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "run.yaml", "--wokers", "2"], "no option '--wokers'; did you mean '--workers'?"),
        (["submit", "run.yaml", "--too=slurm"], "did you mean '--to'?"),
        (["logs", "run", "--folow"], "did you mean '--follow'?"),
        (["train", "run.yaml", "--train.lr=1e-4"], "settings have no dashes: train.lr=1e-5"),
        (
            ["train", "run.yaml", "--workers", "2"],
            "no option '--workers'; settings have no dashes: data.workers=… or cluster.workers=…",
        ),
        (["train", "run.yaml", "--name", "mine"], "settings have no dashes: name=…"),
        (["train", "run.yaml", "--learning-rate=1e-4"], "settings have no dashes: train.lr=…"),
        (["status", "run", "--fast"], "no option '--fast'; see --help"),
    ],
)
def test_a_typo_in_an_option_names_its_neighbour(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and said in capsys.readouterr().err


def test_a_value_with_dashes_is_no_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(tmp_path / "none.yaml"), "--to", "ray", "--site=--place", "--address", "-- here"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_missing_run_file_is_a_usage_error(tmp_path: Path) -> None:
    for command in ("prepare", "train", "plan", "preview"):
        result = dstune(command, str(tmp_path / "none.yaml"))
        assert result.returncode == 2, result.stderr
        assert "no such file" in result.stderr
        assert "Traceback" not in result.stderr


def test_an_interrupt_before_there_is_anything_to_save_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dstune.api.plan", interrupted)
    assert main(["plan", "run.yaml"]) == 130


def test_errors_are_json_too(tmp_path: Path) -> None:
    result = dstune("train", str(tmp_path / "none.yaml"), "--json")
    document = json.loads(result.stdout)
    assert document["exit_status"] == 2
    assert "no such file" in document["error"]


def test_help_and_light_commands_import_neither_torch_nor_ray() -> None:
    program = """
import sys
from dstune.cli.main import main
status = main(sys.argv[1:])
heavy = {"torch", "ray", "deepspeed", "transformers", "datasets"} & set(sys.modules)
assert status == 0 and not heavy, (status, heavy)
"""
    for words in (["--help"], ["schema"], ["schema", "--cleaning"], ["init", "--list"]):
        result = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
