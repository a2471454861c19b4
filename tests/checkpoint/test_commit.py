"""A commit happens whole or not at all: under kill -9 at every point, a full disk, a failing or dying worker."""

import multiprocessing
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dstune.checkpoint.commit import save
from dstune.checkpoint.reader import Reader
from dstune.checkpoint.resolve import newest_whole, verify
from dstune.engine.control import ControlGroup
from dstune.errors import CheckpointError
from tests.checkpoint.sample import Alone, at, commit, slices, steps, whole
from tests.spawn import run_workers


def _in_child(function: Callable[[], Any]) -> int:
    """Run `function` in a forked process; its exit status."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def _commit_dying_at(checkpoints: Path, point: int) -> None:
    """Save step 2 and die, as under kill -9, before the `point`-th write, fsync, rename, mkdir or unlink."""
    left = point

    def dies(act: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return act(*arguments, **named)

        return counted

    for name in ("open", "pwrite", "ftruncate", "fsync", "rename", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dies(getattr(os, name)))
    commit(checkpoints, 2)


def test_killed_at_any_point_a_commit_exists_whole_or_not_at_all(tmp_path: Path) -> None:
    outcomes: list[int] = []
    for point in range(1, 100):
        checkpoints = tmp_path / str(point)
        commit(checkpoints, 1)
        (checkpoints / "step-00000001.tmp-old").mkdir()
        (checkpoints / "step-00000001.tmp-old" / "shard").write_bytes(b"left behind")
        status = _in_child(lambda checkpoints=checkpoints, point=point: _commit_dying_at(checkpoints, point))
        found, passed_over = newest_whole(checkpoints)
        assert found is not None and not passed_over, (point, passed_over)
        outcomes.append(found.step)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        commit(checkpoints, 3)
        assert newest_whole(checkpoints)[0] == at(checkpoints, 3)
        assert not [path for path in checkpoints.iterdir() if "tmp" in path.name]
    assert outcomes[0] == 1 and outcomes[-1] == 2 and outcomes == sorted(outcomes)
    assert len(outcomes) > 15


def _limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("limit", [0, 100, 2000])
def test_a_file_that_cannot_grow_is_a_clear_error_and_the_old_checkpoint_stays(tmp_path: Path, limit: int) -> None:
    commit(tmp_path, 1)

    def fails() -> None:
        _limit_file_size(limit)
        with pytest.raises(CheckpointError, match=r"(?s)worker 0 on .*File too large.*untouched"):
            commit(tmp_path, 2)

    assert _in_child(fails) == 0
    assert steps(tmp_path) == [1] and len(list(tmp_path.iterdir())) == 1
    assert verify(at(tmp_path, 1)) == []


def test_a_full_disk_is_a_clear_error_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs wants root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], check=False)
    if mounted.returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    try:
        commit(tmp_path, 1)
        filler = tmp_path / "filler"
        filler.write_bytes(b"x" * 48_000)
        with pytest.raises(CheckpointError, match="No space left on device"):
            for step in range(2, 20):
                commit(tmp_path, step)
        last = steps(tmp_path)[-1]
        assert verify(at(tmp_path, last)) == []
        assert not list(tmp_path.glob("*.tmp-*"))
        filler.unlink()
        commit(tmp_path, 20)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def _control() -> ControlGroup:
    dist.init_process_group("gloo")
    return ControlGroup(timedelta(seconds=60))


def _faulty_worker(checkpoints: Path, fault: str) -> tuple[str, float]:
    control = _control()
    commit(checkpoints, 1, control)
    pieces = slices(2, control.rank, control.world_size)
    if control.rank == 1 and fault == "disk":
        _limit_file_size(64)
    if control.rank == 1 and fault == "nan":
        pieces[0].tensor[0] = float("nan")
    if control.rank == 1 and fault == "gap":
        pieces.pop()
    if control.rank == 1 and fault == "bug":
        pieces[0] = object()  # type: ignore[call-overload]
    began = time.monotonic()
    try:
        save(checkpoints, 2, pieces, {"loss": float("nan")} if fault == "state" else {}, control, {})
    except CheckpointError as error:
        answer = str(error)
    else:
        answer = "committed"
    _limit_file_size(resource.RLIM_INFINITY)
    seconds = time.monotonic() - began
    control.barrier()
    dist.destroy_process_group()
    return answer, seconds


@pytest.mark.dist
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("disk", "worker 1 on .*File too large"),
        ("nan", "worker 1 on .*fp32/embed.weight: holds NaN"),
        ("gap", "do not make whole parameters: exp_avg/norm.weight"),
        ("bug", "worker 1 on .*AttributeError"),
        ("state", "worker 0 on .*not JSON compliant"),
    ],
)
def test_one_workers_failure_is_everybodys_and_nothing_is_left(tmp_path: Path, fault: str, words: str) -> None:
    answers = run_workers(_faulty_worker, 3, tmp_path, fault, seconds=120)
    assert len({answer for answer, _ in answers}) == 1
    assert re.search(words, answers[0][0]), answers[0][0]
    assert max(seconds for _, seconds in answers) < 30
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert verify(at(tmp_path, 1)) == []


def _dying_worker(checkpoints: Path) -> None:
    control = _control()
    commit(checkpoints, 1, control)
    if control.rank == 1:
        os._exit(0)
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        commit(checkpoints, 2, control)
    assert time.monotonic() - began < 20


@pytest.mark.dist
def test_a_worker_that_dies_in_a_save_does_not_hang_the_others(tmp_path: Path) -> None:
    # Worker 1 leaves no result; that worker 0 left in order, within the limit, is what is shown.
    with pytest.raises(FileNotFoundError, match="result-1"):
        run_workers(_dying_worker, 2, tmp_path, seconds=50)
    assert steps(tmp_path) == [1]
    assert newest_whole(tmp_path)[0] == at(tmp_path, 1)


def test_a_commit_is_never_replaced_and_a_damaged_one_is_moved_aside(tmp_path: Path) -> None:
    record = commit(tmp_path, 1)
    with pytest.raises(CheckpointError, match="is committed already"):
        commit(tmp_path, 1)
    shard = next(record.directory.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    commit(tmp_path, 1)
    assert verify(at(tmp_path, 1)) == []
    assert len(list(tmp_path.glob("step-00000001.damaged-*"))) == 1


def test_record_manifest_and_state(tmp_path: Path) -> None:
    record = commit(tmp_path, 7, metrics={"loss": 1.5})
    reader = Reader(record.directory)
    assert record.step == reader.step == 7 and reader.state == {"step": 7}
    assert record.bytes == sum(p.stat().st_size for p in record.directory.iterdir() if p.name != "manifest.json")
    assert reader.manifest.metrics == {"loss": 1.5} and reader.manifest.fingerprints == {"run": "test"}
    assert torch.equal(reader.read("fp32", "embed.weight"), whole("fp32", "embed.weight", 7))


def test_alone_is_a_control() -> None:
    assert Alone().gather({"a": 1}) == [{"a": 1}]
