"""Checkpoints behind an address: in a real S3 server by real workers, and killed, cut, damaged and lost on any filesystem."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pyarrow import fs

from dstune.checkpoint import origin
from dstune.checkpoint.commit import Intent
from dstune.checkpoint.home import Home
from dstune.checkpoint.keeping import Rules
from dstune.checkpoint.layout import load_manifest
from dstune.checkpoint.listing import stored
from dstune.checkpoint.objects import Objects, Unavailable
from dstune.checkpoint.reader import Reader
from dstune.checkpoint.remote import Store
from dstune.checkpoint.resolve import verify
from dstune.checkpoint.shard_writer import write_shard
from dstune.engine.control import ControlGroup
from dstune.errors import CheckpointError, ConfigError
from dstune.paths import step_directory
from tests.checkpoint.sample import SHAPES, Alone, at, commit, slices, steps, whole
from tests.conftest import BUCKET
from tests.spawn import run_workers

ADDRESS = f"s3://{BUCKET}/runs/mine"


def assert_holds(directory: Path, step: int) -> None:
    """Every element that was saved at `step` is read from `directory`, whatever the shards."""
    reader = Reader(directory)
    assert reader.state == {"step": step}
    for state in ("fp32", "exp_avg"):
        for name in SHAPES:
            assert torch.equal(reader.read(state, name), whole(state, name, step))


def commit_at(home: Home, step: int, control: Any) -> None:
    pieces = slices(step, control.rank, control.world_size)
    intent = Intent(step, {"step": step}, {}, {"loss": 1.0 / step})
    home.commit(intent, lambda path, number: write_shard(path, pieces, number), control)


def save(home: Home, step: int, control: Any) -> None:
    commit_at(home, step, control)
    home.publish(step, control)


def flipped(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- workers, and an S3 server ---------------------------------------------------------------------------------------


def _one_disk(shared: Path, control: ControlGroup) -> None:
    """Saves, a shard that is damaged before it is uploaded, retention; in the shared directory and in the store."""
    home = Home.find(shared, ADDRESS, control)
    assert home.shared and home.leader == 0 and home.store is not None
    control.barrier()
    assert names(shared) == []
    control.barrier()
    for step in (1, 2):
        save(home, step, control)
        assert home.publish(step, control) is None  # nothing is left to send
    control.barrier()
    own = f"shard-{control.rank:05d}-of-00002.safetensors"
    commit_at(home, 3, control)
    if control.rank == 1:
        path = step_directory(shared, 3) / own
        path.write_bytes(flipped(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"worker 1 on .*SHA-256"):
        home.publish(3, control)
    assert home.store.committed() == [1, 2]
    save(home, 4, control)
    assert home.prune(Rules(keep=2), control) == [1, 2]
    assert home.prune_store(Rules(keep=2), control) == [1]
    assert steps(shared) == [3, 4] and home.store.committed() == [2, 4]


def _own_disks(folder: Path, control: ControlGroup) -> None:
    """Workers with a disk each: refused without a store; with one, every save is there, and every resume comes from there."""
    disk = folder / f"node-{control.rank}"
    with pytest.raises(ConfigError, match=r"worker 1 \(.*does not see; expected .*\n.*s3://"):
        Home.find(disk, None, control)
    home = Home.find(disk, f"{ADDRESS}-staged", control)
    assert home.store is not None and not home.shared and home.leader == control.rank
    save(home, 1, control)
    save(home, 2, control)
    assert names(disk) == []
    control.barrier()
    if control.rank == 0:
        origin.newest(disk, home.store)
    control.barrier()
    directory = home.bring(step_directory(folder / "node-0", 2), control)
    assert directory == step_directory(disk, 2)
    assert_holds(directory, 2)
    save(home, 3, control)
    assert names(disk) == []
    assert home.prune(Rules(keep=1), control) == []
    assert home.prune_store(Rules(keep=1), control) == [1, 2]
    assert home.store.committed() == [3]


def _dies_before_the_manifest(shared: Path, control: ControlGroup) -> None:
    home = Home.find(shared, ADDRESS, control)
    assert home.store is not None
    if control.rank == 0:
        home.store._seal = lambda directory: os._exit(0)
    with pytest.raises(RuntimeError):
        save(home, 5, control)


def _live(folder: Path) -> None:
    dist.init_process_group("gloo")
    control = ControlGroup(timedelta(seconds=60))
    _one_disk(folder / "shared", control)
    _own_disks(folder, control)
    _dies_before_the_manifest(folder / "shared", control)


@pytest.mark.dist
def test_workers_keep_their_checkpoints_in_an_object_store(s3: fs.S3FileSystem, tmp_path: Path) -> None:
    # Worker 0 leaves no result: its last act is to die when all shards are in the store and the manifest is not.
    with pytest.raises(FileNotFoundError, match="result-0"):
        run_workers(_live, 2, tmp_path, seconds=120)
    store = Store(ADDRESS)
    shards = [info.path for info in s3.get_file_info(fs.FileSelector(f"{BUCKET}/runs/mine/step-00000005"))]
    assert len(shards) == 3 and store.committed() == [2, 4]
    assert [store.verify(step) for step in (2, 4)] == [[], []]
    shutil.rmtree(tmp_path / "shared")
    found = origin.newest(tmp_path / "shared", store)
    assert found.checkpoint == at(tmp_path / "shared", 4) and found.fetched and not found.passed_over
    assert_holds(found.checkpoint.directory, 4)
    commit(tmp_path / "shared", 5)
    store.upload(step_directory(tmp_path / "shared", 5))
    assert [row["verified"] for row in stored(store, read=True)] == [True] * 3
    assert_holds(Store(f"{ADDRESS}-staged").fetch(3, tmp_path / "fetched").directory, 3)


@contextlib.contextmanager
def unsigned_requests_refused() -> Iterator[None]:
    def allow(count: bytes) -> None:
        address = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
        asked = urllib.request.Request(address, count, {"Content-Type": "text/plain"})
        urllib.request.urlopen(asked, timeout=10).close()

    allow(b"0")
    try:
        yield
    finally:
        allow(b"1000000000")


def test_a_store_that_cannot_be_written_to_is_told_before_training(
    s3: fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    Store(ADDRESS).probe()
    assert Store(ADDRESS).committed() == []
    with pytest.raises(ConfigError, match=r"checkpoint\.dir: s3://no-such-bucket/x: .*NO_SUCH_BUCKET"):
        Store("s3://no-such-bucket/x").probe()
    with unsigned_requests_refused(), pytest.raises(ConfigError, match=r"(?s)cannot be used.*credentials"):
        Store(ADDRESS).probe()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="cannot be used"):
        Store(ADDRESS).probe()
    with pytest.raises(Unavailable):
        origin.newest(Path("/nowhere"), Store(ADDRESS))
    with pytest.raises(ConfigError, match="nowhere"):
        Store("nowhere://x")


def test_a_directory_that_cannot_be_written_to_is_told_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"checkpoint\.dir: .*worker 0 on .*Not a directory"):
        Home.find(tmp_path / "file" / "checkpoints", None, Alone())


# --- any filesystem --------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> tuple[Path, Store]:
    """Steps 1 and 2, on a disk and in a store."""
    here, store = tmp_path / "here", Store(f"file://{tmp_path}/there")
    for step in (1, 2):
        commit(here, step, metrics={"loss": float(step)})
        store.upload(step_directory(here, step))
    return here, store


def there(store: Store, step: int) -> Path:
    return Path(store.address_of(step).removeprefix("file://"))


def _upload_dying_at(directory: Path, address: str, point: int) -> None:
    """Upload, and die, as under kill -9, before the `point`-th thing that the store is asked."""
    store, asking, left = Store(address, piece_bytes=400), Objects._asking, point

    def counted(self: Objects) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return asking(self)

    Objects._asking = counted
    store.upload(directory)


def test_killed_at_any_point_an_upload_is_there_whole_or_not_at_all(kept: tuple[Path, Store]) -> None:
    here, store = kept
    commit(here, 3)
    commit(here, 4)
    outcomes: list[list[int]] = []
    for point in range(1, 200):
        arguments = (step_directory(here, 3), store.address, point)
        process = multiprocessing.get_context("fork").Process(target=_upload_dying_at, args=arguments)
        process.start()
        process.join(60)
        outcomes.append(store.committed())
        assert all(store.verify(step) == [] for step in outcomes[-1])
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        store.upload(step_directory(here, 4))
        assert {step_directory(here, step).name for step in store.committed()} == set(names(there(store, 1).parent))
        for step in {3, 4} & set(store.committed()):
            store.remove(step)
    assert outcomes[0] == [1, 2] and outcomes[-1] == [1, 2, 3]
    assert len(outcomes) > 15


@pytest.mark.parametrize("kind", ["shard-00000", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_what_is_damaged_in_the_store_is_named_and_passed_over(
    kept: tuple[Path, Store], kind: str, damage: str, tmp_path: Path
) -> None:
    _, store = kept
    path = next(there(store, 2).glob(f"{kind}*"))
    content = path.read_bytes()
    path.write_bytes({"flipped": flipped(content), "cut": content[:-1], "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    found = origin.newest(tmp_path / "new", store)
    assert found.checkpoint == at(tmp_path / "new", 1)
    assert_holds(found.checkpoint.directory, 1)
    assert names(tmp_path / "new") == ["step-00000001"]
    if (kind, damage) == ("manifest.json", "gone"):  # then it is no checkpoint
        assert store.committed() == [1] and not found.passed_over
        return
    (problem,) = store.verify(2)
    assert problem.file == path.name
    (reason,) = found.passed_over
    assert path.name in reason and store.address_of(2) in reason


def test_foreign_objects_and_other_steps_are_refused(kept: tuple[Path, Store], tmp_path: Path) -> None:
    _, store = kept
    (there(store, 2) / "shard-00007-of-00008.safetensors").write_bytes(b"")
    assert "shard-00007-of-00008.safetensors: does not belong" in str(store.verify(2)[0])
    shutil.copytree(there(store, 1), there(store, 9))
    assert "is of step 1" in str(store.verify(9)[0])
    with pytest.raises(CheckpointError, match="is of step 1"):
        store.fetch(9, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_newest_whole_one_counts_wherever_it_is(kept: tuple[Path, Store]) -> None:
    here, store = kept
    assert origin.newest(here, store) == origin.Origin(at(here, 2), False, [])
    shard = next(step_directory(here, 2).glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    found = origin.newest(here, store)
    assert found.fetched and found.checkpoint == at(here, 2) and verify(at(here, 2)) == []
    assert len(found.passed_over) == 1 and shard.name in found.passed_over[0]
    assert len(list(here.glob("step-00000002.damaged-*"))) == 1
    commit(here, 3)
    assert origin.newest(here, store).checkpoint == at(here, 3)


def test_a_checkpoint_of_the_store_is_chosen_by_step_newest_and_best(kept: tuple[Path, Store], tmp_path: Path) -> None:
    here, store = kept
    shutil.rmtree(step_directory(here, 1))
    for wanted, step in (("1", 1), ("2", 2), ("newest", 2), ("best", 1)):
        chosen = origin.choose(here, store.address, wanted, "loss", into=tmp_path / wanted)
        assert chosen.directory == step_directory(here if step == 2 else tmp_path / wanted, step)
        assert_holds(chosen.directory, step)
    with pytest.raises(CheckpointError, match=r"no committed step '7'; expected one of: 1, 2"):
        origin.choose(here, store.address, "7", None, into=tmp_path)


def test_a_large_file_goes_in_pieces(tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/there", piece_bytes=500)
    record = commit(tmp_path / "here", 1)
    store.upload(record.directory)
    size = next(record.directory.glob("shard-*")).stat().st_size
    pieces = sorted(there(store, 1).glob("shard-*.part-*"))
    assert [piece.stat().st_size for piece in pieces] == [500] * (size // 500) + [size % 500]
    assert store.verify(1) == []
    assert_holds(store.fetch(1, tmp_path / "new").directory, 1)
    pieces[1].unlink()
    assert str(store.verify(1)[0]) == "shard-00000-of-00001.safetensors (worker 0): is missing"


def test_a_step_that_was_saved_again_replaces_the_one_in_the_store(kept: tuple[Path, Store], tmp_path: Path) -> None:
    _, store = kept
    again = commit(tmp_path / "again", 2, metrics={"loss": 7.0})
    store.upload(again.directory)
    assert store.verify(2) == [] and store.manifest(2).metrics == {"loss": 7.0}
    assert store.manifest(2) == load_manifest(again.directory)


def test_nothing_is_removed_before_a_newer_one_was_read_back(kept: tuple[Path, Store]) -> None:
    here, store = kept
    for step in (3, 4):
        commit(here, step, metrics={"loss": float(step)})
        store.upload(step_directory(here, step))

    shard = next(there(store, 4).glob("shard-*"))
    shard.write_bytes(flipped(shard.read_bytes()))
    assert store.prune(Rules(keep=1, best="loss"), Alone()) == [2]
    assert store.committed() == [1, 3, 4]
    assert store.prune(Rules(keep=1, best="loss"), Alone()) == []


def test_any_filesystem_of_fsspec_keeps_checkpoints(tmp_path: Path) -> None:
    record, store = commit(tmp_path / "here", 1), Store("memory://runs/mine")
    store.probe()
    store.upload(record.directory)
    assert store.committed() == [1] and store.verify(1) == []
    assert_holds(store.fetch(1, tmp_path / "new").directory, 1)
    store.remove(1)
    assert store.committed() == []
