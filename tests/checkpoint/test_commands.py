"""`dstune checkpoint list`, `verify` and `prune`, as a person and a script see them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dstune.cli.main import main
from dstune.launch import fence
from dstune.launch.driver import driver_lock
from dstune.paths import RunPaths
from dstune.records.console import ReadingProgress
from tests.checkpoint.sample import at, commit, steps

_LOSSES = {1: 3.0, 2: 1.5, 3: 2.0, 4: 2.5, 5: 2.25, 6: 2.125}


@pytest.fixture
def trained(run: RunPaths) -> RunPaths:
    """Steps 1 to 6; the run's rules keep the newest 2, every 4th and the best, step 2."""
    for step, loss in _LOSSES.items():
        commit(run.checkpoints, step, metrics={"loss": loss} if step != 6 else {})
    run.metrics.write_text('{"step": 6, "loss": 2.0625}\n')
    return run


def _flip(run: RunPaths, step: int) -> Path:
    path = next(at(run.checkpoints, step).directory.glob("shard-*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict]:
    status = main(["checkpoint", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_table(trained: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    (trained.checkpoints / "step-00000007.tmp-12ab").mkdir()
    (trained.checkpoints / "step-00000007.tmp-12ab" / "shard").write_bytes(b"0" * 1500)
    next(at(trained.checkpoints, 3).directory.glob("shard-*")).unlink()
    assert main(["checkpoint", "list", str(trained.root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["step", "time", "size", "world", "loss", "verified", "kept", "because"]
    ends = [line.partition("Z  ")[2].split(maxsplit=4) for line in lines[1:7]]
    assert [end[3] for end in ends] == ["3.0000", "1.5000", "2.0000", "2.5000", "2.2500", "2.0625"]
    assert [line.rpartition("  ")[2] for line in lines[1:7]] == [
        "nothing: goes with the next save or prune",
        "best loss",
        "nothing: goes with the next save or prune",
        "every 4",
        "newest 2",
        "newest 2",
    ]
    assert "2.0625 (train)  not looked at" in lines[6]
    assert "no: worker 0's shard missing" in lines[3]
    assert lines[7].startswith(
        "step 3: shard-00000-of-00001.safetensors (worker 0): is missing; lost: fp32/embed.weight[0:400]"
    )
    assert lines[8:] == ["not committed:", "  step-00000007.tmp-12ab  1.50 kB  a save that was cut short"]
    with driver_lock(trained):
        main(["checkpoint", "list", str(trained.root)])
    assert "a save that goes on" in capsys.readouterr().out


def test_the_table_as_json(trained: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = _json(capsys, "list", str(trained.root))
    assert status == 0 and [row["verified"] for row in found["checkpoints"]] == [None] * 6
    path = _flip(trained, 6)
    status, found = _json(capsys, "list", str(trained.root), "--verify")
    assert status == 1 and [row["verified"] for row in found["checkpoints"]] == [True] * 5 + [False]
    last = found["checkpoints"][-1]
    assert last["kept_because"] == ["newer than the newest whole one, step 5"]
    assert (last["loss"], last["train_loss"], last["world_size"], last["step"]) == (None, 2.0625, 1, 6)
    assert last["problems"][0]["file"] == path.name and last["problems"][0]["worker"] == 0
    assert last["bytes"] == sum(file.stat().st_size for file in path.parent.iterdir() if file.name != "manifest.json")


def test_verify_says_what_is_wrong_and_how_fast_it_read(trained: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(trained.root)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 7 and "GB/s; none damaged" in said[-1]
    _flip(trained, 5)
    assert main(["checkpoint", "verify", str(trained.root)]) == 1
    said = capsys.readouterr().out
    assert "DAMAGED\n    shard-00000-of-00001.safetensors (worker 0): its SHA-256" in said and "1 damaged" in said
    assert _json(capsys, "verify", str(trained.root), "--step", "6")[0] == 0
    status, found = _json(capsys, "verify", str(trained.root), "--step", "5")
    assert status == 1 and found["newest_whole"] is None
    assert found["bytes_read"] == found["checkpoints"][0]["bytes"]
    assert main(["checkpoint", "verify", str(trained.root), "--step", "9"]) == 1
    assert "no committed step '9'; expected one of: 1, 2, 3, 4, 5, 6" in capsys.readouterr().err


def test_nothing_committed_is_no_error(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("list", "verify", "prune"):
        assert main(["checkpoint", action, str(run.root)]) == 0
    assert capsys.readouterr().out.count("nothing is committed") == 2


def test_prune_by_the_runs_rules(trained: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    (trained.checkpoints / "step-00000007.tmp-12ab").mkdir()
    status, planned = _json(capsys, "prune", str(trained.root), "--dry-run")
    assert status == 0 and steps(trained.checkpoints) == [1, 2, 3, 4, 5, 6]
    status, done = _json(capsys, "prune", str(trained.root))
    assert planned | {"dry_run": False} == done and status == 0
    assert [one["step"] for one in done["deleted"]] == [1, 3] and done["newest_whole"] == 6
    assert done["freed_bytes"] == sum(one["bytes"] for one in done["deleted"]) > 0
    assert sorted(path.name for path in trained.checkpoints.iterdir()) == [
        f"step-0000000{step}" for step in (2, 4, 5, 6)
    ]
    assert '"removed"' in trained.events.read_text()


def test_prune_by_rules_of_this_once(trained: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--keep", "1", "--keep-every", "0", "--best", "loss", "--best-mode", "max"]
    assert main(["checkpoint", "prune", str(trained.root), *words]) == 0
    said = capsys.readouterr().out
    assert "step 6 was read back and is whole" in said and "kept     step 1: best loss" in said
    assert steps(trained.checkpoints) == [1, 6]


def test_prune_keeps_the_last_good_one(trained: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    _flip(trained, 6)
    _flip(trained, 5)
    status, done = _json(capsys, "prune", str(trained.root), "--keep", "1")
    assert status == 0 and steps(trained.checkpoints) == [2, 4, 5, 6] and done["newest_whole"] == 4
    for step in (2, 4):
        _flip(trained, step)
    assert main(["checkpoint", "prune", str(trained.root), "--keep", "1"]) == 1
    assert "no checkpoint is whole" in capsys.readouterr().err
    assert steps(trained.checkpoints) == [2, 4, 5, 6]


@pytest.mark.parametrize("alive", ["driver", "worker"])
def test_beside_a_living_run_only_committed_ones_go(
    trained: RunPaths, alive: str, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = trained.checkpoints / "step-00000007.tmp-12ab"
    unfinished.mkdir()
    holder = driver_lock(trained) if alive == "driver" else fence.empty(trained)
    with holder:
        status, done = _json(capsys, "prune", str(trained.root))
    assert status == 0 and done["running"] and done["left_overs"] == []
    assert steps(trained.checkpoints) == [2, 4, 5, 6] and unfinished.is_dir()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("prune", "--keep", "0"), "--keep: 0; expected at least 1"),
        (("prune", "--keep-every", "-1"), "--keep-every: -1"),
        (("prune", "--best", "los"), "no checkpoint has a value of 'los'"),
        (("list", "--keep", "3"), "`checkpoint list` takes no --keep"),
        (("verify", "--dry-run"), "`checkpoint verify` takes no --dry-run"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    trained: RunPaths, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", words[0], str(trained.root), *words[1:]]) == 2
    assert said in capsys.readouterr().err and steps(trained.checkpoints) == [1, 2, 3, 4, 5, 6]


def test_a_list_imports_nothing_heavy(trained: RunPaths) -> None:
    program = (
        "import sys\nfrom dstune.cli.main import main\nstatus = main(sys.argv[1:])\n"
        "assert not {'torch', 'ray', 'deepspeed', 'transformers'} & set(sys.modules)\nsys.exit(status)"
    )
    words = [sys.executable, "-c", program, "checkpoint", "list", str(trained.root)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_the_progress_counts_and_shows_itself_in_a_terminal_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with ReadingProgress(100) as show:
        show.more(30)
        show.more(70)
    assert show.bytes == 100 and show.seconds >= 0
    assert capsys.readouterr() == ("", "")
