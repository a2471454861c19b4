"""Saving behind the training: what is committed is what was copied; failures surface once, at every worker alike."""

import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dstune.checkpoint import home
from dstune.checkpoint.home import Home, NotPublished
from dstune.checkpoint.reader import Reader
from dstune.checkpoint.remote import Store
from dstune.checkpoint.resolve import newest_whole
from dstune.config.schema import CheckpointSection
from dstune.errors import CheckpointError
from dstune.protocols import Slice
from dstune.training import saver as room
from dstune.training.saver import CheckpointSaver
from dstune.training.state import TrainState
from tests.checkpoint.sample import Alone, slices, steps


class FakeEngine:
    """The part of an engine that saving looks at."""

    def __init__(self) -> None:
        self.pieces = slices(1)

    def slices(self) -> Iterator[Slice]:
        yield from self.pieces

    def extra_state(self) -> dict[str, Any]:
        return {}


class Told:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, **facts: Any) -> None:
        self.events.append((kind, facts))

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


def state(step: int) -> TrainState:
    return TrainState(prepared_fingerprint="x", seed=1, global_batch_size=4, total_steps=9, step=step)


def made(checkpoints: Path, store: Store | None = None, **settings: Any) -> tuple[CheckpointSaver, FakeEngine, Told]:
    engine, told = FakeEngine(), Told()
    section = CheckpointSection(**settings)
    saver = CheckpointSaver(
        section, Home(checkpoints, store), engine, Alone(), behind=Alone(), fingerprints={"run": "x"}, events=told
    )  # type: ignore[arg-type]
    return saver, engine, told


@pytest.mark.parametrize("background", [True, False])
def test_what_is_committed_is_the_state_of_the_call(tmp_path: Path, background: bool) -> None:
    saver, engine, told = made(tmp_path, background=background)
    before = engine.pieces[0].tensor.clone()
    saver.save(state(3), {"loss": 1.5})
    engine.pieces[0].tensor.zero_()
    saver.settle()
    assert not saver.failed()
    newest, passed_over = newest_whole(tmp_path)
    assert newest is not None and newest.step == 3 and not passed_over
    reader = Reader(newest.directory)
    assert torch.equal(reader.read("fp32", "embed.weight"), before)
    assert reader.manifest.metrics == {"loss": 1.5}
    assert told.kinds == ["commit"] and told.events[0][1]["standstill_seconds"] >= 0


def test_a_metric_that_is_not_finite_does_not_cost_the_checkpoint(tmp_path: Path) -> None:
    saver, _, told = made(tmp_path)
    saver.save(state(3), {"loss": math.nan, "accuracy": 0.5})
    saver.settle()
    assert told.kinds == ["commit"]
    assert Reader(tmp_path / "step-00000003").manifest.metrics == {"accuracy": 0.5}


def test_training_goes_on_while_a_save_is_written_and_the_next_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, asked = threading.Event(), threading.Event()
    real = home.commit.commit

    def slow(*words: Any) -> Any:
        asked.set()
        gate.wait()
        return real(*words)

    monkeypatch.setattr(home.commit, "commit", slow)
    saver, engine, told = made(tmp_path)
    saver.save(state(1), {})
    asked.wait()
    engine.pieces[0].tensor.zero_()  # a step of training
    assert steps(tmp_path) == [] and not saver.failed()
    opener = threading.Timer(0.0, gate.set)
    opener.start()
    saver.save(state(2), {})
    saver.settle()
    opener.join()
    assert steps(tmp_path) == [1, 2]
    assert told.kinds == ["commit", "commit"]
    assert Reader(tmp_path / "step-00000001").read("fp32", "embed.weight").any()
    assert not Reader(tmp_path / "step-00000002").read("fp32", "embed.weight").any()


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_save_that_fails_behind_the_training_is_told_once_and_never_committed(tmp_path: Path, on_error: str) -> None:
    saver, engine, told = made(tmp_path, on_error=on_error)
    saver.save(state(1), {})
    saver.settle()
    engine.pieces[0].tensor[0] = float("nan")
    saver.save(state(2), {})
    if on_error == "stop":
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            saver.settle()
    else:
        saver.settle()
    assert not saver.failed()
    saver.settle()  # once is enough
    assert told.kinds == ["commit", "commit_failed"]
    assert steps(tmp_path) == [1]
    engine.pieces[0].tensor[0] = 0.0
    saver.save(state(3), {})
    saver.settle()
    assert steps(tmp_path) == [1, 3]


def test_a_failure_is_seen_without_waiting(tmp_path: Path) -> None:
    saver, engine, _ = made(tmp_path)
    engine.pieces[0].tensor[0] = float("inf")
    saver.save(state(1), {})
    assert saver._saving is not None
    with pytest.raises(CheckpointError):
        saver._saving[1].result()
    assert saver.failed()


def test_where_memory_is_short_the_training_waits_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda: 1000)
    saver, _, told = made(tmp_path)
    saver.save(state(1), {})
    assert steps(tmp_path) == [1]  # before anybody settles
    assert told.kinds == ["saving_in_the_foreground", "commit"]


def test_old_checkpoints_go_behind_the_training_too(tmp_path: Path) -> None:
    saver, _, told = made(tmp_path, keep=2)
    for step in (1, 2, 3):
        saver.save(state(step), {})
    saver.settle()
    assert steps(tmp_path) == [2, 3]
    assert ("removed", {"steps": [1]}) in told.events


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_save_is_published_and_one_that_could_not_be_is_caught_up(tmp_path: Path, on_error: str) -> None:
    store = Store(f"file://{tmp_path}/store/mine")
    saver, _, told = made(tmp_path / "disk", store, keep=2, on_error=on_error)
    for step in (1, 2, 3):
        saver.save(state(step), {})
    saver.settle()
    assert steps(tmp_path / "disk") == store.committed() == [2, 3]
    assert told.kinds[-4:] == ["commit", "removed", "published", "removed_from_store"]
    (tmp_path / "store/mine").rename(tmp_path / "store/away")
    (tmp_path / "store/mine").write_text("in the way")
    saver.save(state(4), {})
    if on_error == "stop":
        with pytest.raises(NotPublished):
            saver.settle()
    saver.settle()
    assert told.kinds[-3:] == ["commit", "removed", "publish_failed"]
    (tmp_path / "store/mine").unlink()
    (tmp_path / "store/away").rename(tmp_path / "store/mine")
    saver, _, told = made(tmp_path / "disk", store)
    saver.catch_up(4)
    saver.settle()
    assert told.kinds == ["published"] and store.committed() == [2, 3, 4]
    saver.catch_up(4)
    saver.settle()
    assert told.kinds == ["published"]
