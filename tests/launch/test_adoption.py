"""A run whose directory is lost: gone on with from its checkpoints by its own run file, and by no other."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs

from dstune import api
from dstune.checkpoint.commit import save
from dstune.checkpoint.remote import Store
from dstune.config import identity
from dstune.config.load import load_run
from dstune.data.shards import Prepared
from dstune.errors import EXIT_DATA, CheckpointError, DataError, DstuneError, UsageError
from dstune.launch import adoption, rundir, start
from dstune.launch.attempts import DriveLimits
from dstune.launch.driver import Observer
from dstune.paths import RunPaths, step_directory
from tests.checkpoint.sample import Alone, slices
from tests.conftest import BUCKET
from tests.runs.tiny import ProcessExecutor, write_run
from tests.spawn import read_lines

ADDRESS = f"s3://{BUCKET}/runs"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path, checkpoint={"dir": ADDRESS})


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return api.prepare(write_run(tmp_path_factory.mktemp("prepared")))


def leave(file: Path, prepared: Prepared, *steps: int) -> Store:
    """What a run leaves in the store when its machine is lost."""
    loaded = load_run(file)
    address = rundir.store_of(loaded.config)
    assert address is not None
    store = Store(address)
    for step in steps:
        fingerprints = identity.fingerprints(loaded.config, prepared.fingerprint)
        folder = file.parent / "lost"
        store.upload(save(folder, step, slices(step), {"step": step}, Alone(), fingerprints).directory)
        shutil.rmtree(folder)
    return store


def adopt(file: Path, *overrides: str) -> RunPaths:
    return adoption.create(load_run(file, overrides), api.prepare)


def adopted(paths: RunPaths) -> list[dict[str, Any]]:
    return [event for event in read_lines(paths.events) if event["event"] == "adopted"] if paths.events.exists() else []


def test_a_new_run_finds_nothing_and_owns_its_store(s3: fs.S3FileSystem, run: Path) -> None:
    assert not adoption.lost(run)
    paths = adopt(run)
    assert adopted(paths) == [] and not adoption.lost(run)
    Store(f"{ADDRESS}/tiny", owner=rundir.environment(paths)["store_owner"]).require_ours()


def test_the_same_run_file_goes_on(
    s3: fs.S3FileSystem, run: Path, prepared: Prepared, caplog: pytest.LogCaptureFixture
) -> None:
    store = leave(run, prepared, 3, 6)
    assert adoption.lost(run)
    with caplog.at_level(logging.WARNING):
        paths = adopt(run, "cluster.workers=1", "checkpoint.keep=7", "train.max_steps=20", "deepspeed.preset=zero2")
    (event,) = adopted(paths)
    assert event["step"] == 6 and event["checkpoints"] == [store.address_of(3), store.address_of(6)]
    assert f"{store.address}: checkpoints of this run, up to step 6" in caplog.text
    assert store.committed() == [3, 6] and rundir.load(paths).config.cluster.workers == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.path=builtin:tiny-t5", "model.path was 'builtin:tiny-llama', is 'builtin:tiny-t5'"),
        ("train.optimizer=lion", "train.optimizer was 'adamw', is 'lion'"),
        ("train.lr=1e-4", "train.lr was 0.001, is 0.0001"),
        ("train.seed=7", "train.seed was 42, is 7"),
        ("model.adapter.rank=8", "model.adapter.rank was not there, is 8"),
    ],
)
def test_another_run_is_refused_and_nothing_is_made(
    s3: fs.S3FileSystem, run: Path, prepared: Prepared, override: str, said: str
) -> None:
    store = leave(run, prepared, 3)
    with pytest.raises(UsageError, match="holds a checkpoint of another run") as refused:
        adopt(run, override)
    assert said in str(refused.value) and "Another `name:`" in str(refused.value)
    assert not (run.parent / "runs").exists() and store.committed() == [3]
    assert "owner.json" not in [info.base_name for info in s3.get_file_info(fs.FileSelector(f"{BUCKET}/runs/tiny"))]


def test_other_data_is_refused(s3: fs.S3FileSystem, run: Path, prepared: Prepared) -> None:
    leave(run, prepared, 3)
    with pytest.raises(DataError, match=r"was trained on other data.*\n.*data\.prepared") as refused:
        adopt(run, "data.max_length=64")
    assert refused.value.exit_status == EXIT_DATA and not (run.parent / "runs").exists()


def test_one_foreign_checkpoint_among_them_is_enough(s3: fs.S3FileSystem, run: Path, prepared: Prepared) -> None:
    leave(write_run(run.parent / "other", train={"lr": 0.5}, checkpoint={"dir": ADDRESS}), prepared, 9)
    leave(run, prepared, 3, 12)
    with pytest.raises(UsageError, match=r"step-00000009: holds a checkpoint of another run: train\.lr was 0\.5"):
        adopt(run)


def test_what_cannot_be_told_is_not_begun_anew(s3: fs.S3FileSystem, run: Path, prepared: Prepared) -> None:
    store = leave(run, prepared, 3)
    path = f"{BUCKET}/runs/tiny/step-00000003/manifest.json"
    with s3.open_input_stream(path) as stream:
        written = stream.read()
    with s3.open_output_stream(path) as stream:
        stream.write(written.replace(b'"step": 3', b'"step": 4'))
    with pytest.raises(CheckpointError, match=r"(?s)does not match its own hash.*cannot be told"):
        adopt(run)
    assert store.committed() == [3] and not (run.parent / "runs").exists()


def test_an_adopted_run_never_starts_at_step_0(s3: fs.S3FileSystem, run: Path, prepared: Prepared) -> None:
    store = leave(run, prepared, 3)
    paths = adopt(run)
    store.remove(3)
    with pytest.raises(CheckpointError, match="committed step 3, but no checkpoint is whole"):
        start.drive_with(
            rundir.load(paths), paths, prepared, ProcessExecutor(1), DriveLimits(1, 1, max_failures=0), Observer()
        )


def test_a_directory_on_a_disk_is_adopted_and_refused_alike(tmp_path: Path, prepared: Prepared) -> None:
    file = write_run(tmp_path, checkpoint={"dir": "kept"})
    loaded = load_run(file)
    fingerprints = identity.fingerprints(loaded.config, prepared.fingerprint)
    save(tmp_path / "kept" / "tiny", 5, slices(5), {"step": 5}, Alone(), fingerprints)
    assert adoption.lost(file)
    with pytest.raises(UsageError, match="holds a checkpoint of another run"):
        adopt(file, "train.betas=[0.9,0.95]")
    assert adopted(adopt(file))[0]["checkpoints"] == [str(step_directory(tmp_path / "kept" / "tiny", 5))]


def test_the_machine_that_was_thought_lost_uploads_no_more(tmp_path: Path, prepared: Prepared) -> None:
    def upload(store: Store, step: int) -> None:
        store.upload(save(tmp_path / f"{store}", step, slices(step), {"step": step}, Alone(), {}).directory)

    address = f"file://{tmp_path}/there"
    before, after = Store(address, owner="one"), Store(address, owner="two")
    before.claim("first-machine")
    upload(before, 1)
    after.claim("second-machine")
    upload(after, 2)
    with pytest.raises(CheckpointError, match=r"taken over by second-machine .*\n.*move this run directory away"):
        upload(before, 3)
    assert after.committed() == [1, 2]
    (tmp_path / "there" / "owner.json").write_text("{")
    with pytest.raises(CheckpointError, match="taken over by somebody"):
        upload(after, 4)


@pytest.mark.parametrize("command", [api.train, api.resume])
def test_train_and_resume_find_it(
    s3: fs.S3FileSystem, run: Path, prepared: Prepared, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DstuneError, match="has not been started"):
        api.resume(run)
    leave(run, prepared, 3)
    driven: list[RunPaths] = []

    def drive(loaded: Any, paths: RunPaths, *_: Any) -> api.RunResult:
        driven.append(paths)
        return api.RunResult(loaded.config.name, str(paths.root), "succeeded", 12, 0)

    monkeypatch.setattr(api, "_drive", drive)
    command(run, ["cluster.workers=1"])
    assert adopted(driven[0])[0]["step"] == 3
    with pytest.raises(UsageError, match="this run exists already"):
        api.train(run)
