"""`dstune checkpoint list`, `verify` and `prune` of what is in an S3 server, with a run directory and without."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from dstune import api
from dstune.checkpoint.objects import Objects, Unavailable
from dstune.checkpoint.remote import Store
from dstune.cli.main import main
from dstune.config.load import load_run
from dstune.errors import CheckpointError, UsageError
from dstune.launch import rundir
from dstune.launch.driver import driver_lock
from dstune.paths import RunPaths, step_directory
from tests.checkpoint.sample import commit, steps
from tests.conftest import BUCKET

_RUN = f"""
name: tried
model: {{path: builtin:tiny-llama}}
data: {{sources: [{{path: builtin:instructions}}]}}
checkpoint: {{dir: "s3://{BUCKET}/runs", keep: 2, best: loss}}
"""
_LOSSES = {1: 3.0, 2: 1.5, 3: 2.0, 4: 2.5, 5: 2.25}


@pytest.fixture
def store(s3: fs.S3FileSystem) -> Store:
    return Store(f"s3://{BUCKET}/runs/tried")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(_RUN)
    return tmp_path / "run.yaml"


@pytest.fixture
def run(file: Path, store: Store) -> RunPaths:
    """Steps 1 to 5 in the store, 4 and 5 on the disk too."""
    paths = rundir.create(load_run(file))
    for step, loss in _LOSSES.items():
        store.upload(commit(paths.checkpoints, step, metrics={"loss": loss}).directory)
    for step in (1, 2, 3):
        shutil.rmtree(step_directory(paths.checkpoints, step))
    return paths


def _flip(s3: fs.S3FileSystem, step: int) -> None:
    (path,) = [
        info.path
        for info in s3.get_file_info(fs.FileSelector(f"{BUCKET}/runs/tried/step-{step:08d}"))
        if "shard" in info.path
    ]
    with s3.open_input_stream(path) as stream:
        content = bytearray(stream.read())
    content[-1] ^= 1
    with s3.open_output_stream(path) as stream:
        stream.write(bytes(content))


def _leave_unfinished(s3: fs.S3FileSystem, step: int) -> None:
    with s3.open_output_stream(f"{BUCKET}/runs/tried/step-{step:08d}/state.json") as stream:
        stream.write(b"{}")


def _in_store(rows: list[dict[str, Any]]) -> list[int]:
    return [row["step"] for row in rows if row["directory"].startswith("s3://")]


def test_prune_by_the_runs_rules(
    run: RunPaths, store: Store, s3: fs.S3FileSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    _leave_unfinished(s3, 6)
    listed = api.checkpoints(run.root)
    assert [one["name"] for one in listed["left_overs"]] == [store.address_of(6)]
    planned = api.prune_checkpoints(run.root, dry_run=True)
    assert store.committed() == [1, 2, 3, 4, 5] and list(store.unfinished()) == [6]
    with driver_lock(run):
        assert api.prune_checkpoints(run.root, dry_run=True)["left_overs"] == []
    assert main(["checkpoint", "prune", str(run.root), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert planned | {"dry_run": False} == done
    assert _in_store(done["deleted"]) == [1, 3] and done["newest_whole"] == 5 and done["none_whole"] == []
    assert done["freed_bytes"] == sum(one["bytes"] for one in done["deleted"] + done["left_overs"]) > 0
    assert store.committed() == [2, 4, 5] and store.unfinished() == {} and steps(run.checkpoints) == [4, 5]
    assert '"removed_from_store"' in run.events.read_text()


def test_prune_keeps_the_last_good_one(
    run: RunPaths, store: Store, s3: fs.S3FileSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    _flip(s3, 5)
    _flip(s3, 4)
    assert main(["checkpoint", "prune", str(run.root), "--keep", "1"]) == 0
    said = capsys.readouterr().out
    assert "step 5 (in the store) is damaged" in said and "step 3 (in the store) was read back and is whole" in said
    assert store.committed() == [2, 3, 4, 5] and steps(run.checkpoints) == [5]  # 2 is the best
    for step in (2, 3):
        _flip(s3, step)
    assert main(["checkpoint", "prune", str(run.root), "--keep", "1"]) == 1
    assert f"{store.address}: no checkpoint is whole: none is deleted there" in capsys.readouterr().err
    assert store.committed() == [2, 3, 4, 5]


def test_a_pruning_that_is_cut_short_leaves_nothing_that_looks_whole(
    run: RunPaths, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(self: Objects, folder: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Objects, "delete_below", dies)
        api.prune_checkpoints(run.root)
    assert store.committed() == [2, 3, 4, 5] and list(store.unfinished()) == [1]
    api.prune_checkpoints(run.root)
    assert store.committed() == [2, 4, 5] and store.unfinished() == {}


def test_a_checkpoint_that_another_process_removes_too_is_no_error(
    run: RunPaths, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(self: Objects, name: str) -> None:
        delete(self, name)
        raise Unavailable(f"{name}: no such object")

    delete = Objects.delete
    monkeypatch.setattr(Objects, "delete", late)
    assert not store.remove(1) and 1 not in store.committed()
    assert api.prune_checkpoints(run.root)["deleted"] == [] and store.committed() == [2, 4, 5]


def test_what_is_read_in_the_store_is_remembered(run: RunPaths, store: Store, s3: fs.S3FileSystem) -> None:
    api.verify_checkpoints(run.root, step=2)
    rows = api.checkpoints(run.root)["checkpoints"]
    assert [(row["step"], row["directory"]) for row in rows if row["verified"]] == [(2, store.address_of(2))]
    api.prune_checkpoints(run.root, best="loss", best_mode="max")
    assert store.address_of(2) not in run.verified.read_text()


def test_a_run_whose_directory_is_lost_is_seen_by_its_run_file(
    run: RunPaths, store: Store, file: Path, s3: fs.S3FileSystem
) -> None:
    shutil.rmtree(run.root)
    _leave_unfinished(s3, 6)
    assert _in_store(api.checkpoints(file)["checkpoints"]) == [1, 2, 3, 4, 5]
    assert api.verify_checkpoints(file)["newest_whole"] == 5
    with pytest.raises(CheckpointError, match="no committed step '9'; expected one of: 1, 2, 3, 4, 5"):
        api.verify_checkpoints(file, step=9)
    with pytest.raises(UsageError, match="no checkpoint has a value of 'los'"):
        api.prune_checkpoints(file, best="los")
    # Whether it still runs elsewhere, and uploads, cannot be known.
    done = api.prune_checkpoints(file, keep=1)
    assert _in_store(done["deleted"]) == [1, 3, 4] and done["left_overs"] == [] and not done["running"]
    assert store.committed() == [2, 5] and list(store.unfinished()) == [6]
    assert not run.root.exists()
