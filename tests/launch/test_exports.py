"""What an export refuses before it writes a byte."""

from pathlib import Path
from typing import Any

import pytest

import dstune
from dstune.config.load import load_run
from dstune.errors import UsageError
from dstune.launch import rundir
from dstune.paths import RunPaths

_RUN = "name: t\nmodel: {path: builtin:tiny-llama}\ndata: {sources: [{path: builtin:instructions}]}\n"


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    (tmp_path / "run.yaml").write_text(_RUN)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "inside").symlink_to(tmp_path / "runs" / "t" / "checkpoints")
    return rundir.create(load_run(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("out", "options", "said"),
    [
        ("runs/t/checkpoints/step-00000009", {}, "among the run's checkpoints"),
        ("runs/t/checkpoints/step-00000009/export", {}, "among the run's checkpoints"),
        ("inside/export", {}, "among the run's checkpoints"),
        ("link", {}, "exists already"),
        ("out", {"threads": -3}, "--threads: -3; expected at least 1"),
    ],
)
def test_refused(run: RunPaths, tmp_path: Path, out: str, options: dict[str, Any], said: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match=said):
        dstune.export(run.root, tmp_path / out, **options)
    assert sorted(tmp_path.rglob("*")) == before
