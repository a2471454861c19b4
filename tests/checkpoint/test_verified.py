"""What `checkpoint list` remembers of earlier readings, and what makes it forget."""

import os
from pathlib import Path

import pytest

from dstune import api
from dstune.checkpoint import origin
from dstune.checkpoint.remote import Store
from dstune.checkpoint.verified import Verified
from dstune.cli.main import main
from dstune.paths import RunPaths, step_directory
from tests.checkpoint.sample import commit


@pytest.fixture
def kept(run: RunPaths) -> RunPaths:
    for step in (1, 2, 3):
        commit(run.checkpoints, step, metrics={"loss": float(step)})
    return run


def remembered(run: RunPaths) -> list[int]:
    rows = api.checkpoints(run.root)["checkpoints"]
    assert all(bool(row["verified_at"]) == bool(row["verified"]) for row in rows)
    return [row["step"] for row in rows if row["verified"]]


def shard(run: RunPaths, step: int) -> Path:
    return next(step_directory(run.checkpoints, step).glob("shard-*"))


def flip_unseen(path: Path) -> None:
    """Change a byte as a failing disk does: size and times stay."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_reading_is_remembered_until_a_file_changes(kept: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert remembered(kept) == []
    api.verify_checkpoints(kept.root, step=2)
    assert remembered(kept) == [2]
    api.verify_checkpoints(kept.root)
    assert remembered(kept) == [1, 2, 3]
    main(["checkpoint", "list", str(kept.root)])
    shown = [line.partition("yes, ")[2][:20] for line in capsys.readouterr().out.splitlines()[1:4]]
    assert all(time.endswith("Z") and time[:2] == "20" for time in shown)
    stands = shard(kept, 1).stat()
    os.utime(shard(kept, 1), ns=(stands.st_atime_ns, stands.st_mtime_ns + 1))
    (step_directory(kept.checkpoints, 2) / "note").write_text("")
    with shard(kept, 3).open("ab") as file:
        file.write(b"0")
    assert remembered(kept) == []
    assert [row["verified"] for row in api.checkpoints(kept.root)["checkpoints"]] == [None, None, False]


def test_a_resume_remembers_what_it_read_and_forgets_what_it_passed_over(kept: RunPaths) -> None:
    api.verify_checkpoints(kept.root)
    flip_unseen(shard(kept, 3))
    assert remembered(kept) == [1, 2, 3]
    origin.newest(kept.checkpoints, None, verified=Verified(kept.verified))
    assert remembered(kept) == [1, 2]


def test_a_damage_that_is_found_ends_it(kept: RunPaths) -> None:
    api.checkpoints(kept.root, verify=True)
    flip_unseen(shard(kept, 2))
    assert remembered(kept) == [1, 2, 3]
    api.verify_checkpoints(kept.root)
    assert remembered(kept) == [1, 3]


def test_it_goes_with_the_checkpoint(kept: RunPaths) -> None:
    api.verify_checkpoints(kept.root)
    api.prune_checkpoints(kept.root, keep=1, keep_every=0)
    assert remembered(kept) == [1, 3]  # 1 is the best
    assert "step-00000002" not in kept.verified.read_text()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 1}', '{"x": {"time": 1}}', "\udcff", None])
def test_a_record_that_is_damaged_is_as_none(kept: RunPaths, content: str | None) -> None:
    if content is None:
        kept.verified.mkdir()
    else:
        kept.verified.write_bytes(content.encode("utf-8", "surrogateescape"))
    assert remembered(kept) == []
    assert api.verify_checkpoints(kept.root)["newest_whole"] == 3
    assert origin.newest(kept.checkpoints, None, verified=Verified(kept.verified)).checkpoint is not None
    assert remembered(kept) == ([] if content is None else [1, 2, 3])


def test_a_store_is_remembered_too(kept: RunPaths, tmp_path: Path) -> None:
    store = Store(f"file://{tmp_path}/there")
    for step in (1, 2):
        store.upload(step_directory(kept.checkpoints, step))
    record = Verified(kept.verified)
    origin.newest(tmp_path / "new", store, verified=record)
    assert record.when(store.address_of(2), store.stamp(2)) and not record.when(store.address_of(1), store.stamp(1))
    path = next((tmp_path / "there" / "step-00000002").glob("shard-*"))
    os.utime(path, ns=(0, 1))
    assert not record.when(store.address_of(2), store.stamp(2))
