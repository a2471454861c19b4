"""Whole checkpoints of another run, copied in or written by a run that shares the directory, are named and never used."""

import re
from pathlib import Path
from typing import Any

import pytest

from dstune.checkpoint import owner, retention
from dstune.checkpoint.audit import glance
from dstune.checkpoint.commit import save
from dstune.checkpoint.keeping import Rules
from dstune.checkpoint.leftovers import left_overs
from dstune.checkpoint.resolve import newest_whole
from dstune.config import identity
from dstune.config.schema import RunConfig
from dstune.errors import UsageError
from tests.checkpoint.sample import Alone, slices, steps


def config(name: str = "mine", model: str = "builtin:tiny-llama", **train: Any) -> RunConfig:
    document = {"name": name, "model": {"path": model}, "data": {"sources": [{"path": "x"}]}, "train": train}
    return RunConfig.model_validate(document)


def commit(checkpoints: Path, step: int, of: RunConfig, prepared: str = "data") -> None:
    save(checkpoints, step, slices(step), {"step": step}, Alone(), identity.fingerprints(of, prepared))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Steps 1 and 2 of our own run, which has gone by."""
    with owner.claimed(tmp_path, config(), "data"):
        commit(tmp_path, 1, config())
        commit(tmp_path, 2, config())
    return tmp_path


FOREIGN = {
    "seed": (config(seed=7), "data", "train.seed 7 (here 42)"),
    "rate": (config(lr=0.5), "data", "train.lr 0.5"),
    "name": (config(name="theirs"), "data", "name 'theirs' (here 'mine')"),
    "data": (config(), "other", "is of a run on other data"),
}


@pytest.mark.parametrize(("of", "prepared", "said"), FOREIGN.values(), ids=FOREIGN)
def test_another_runs_checkpoint_is_passed_over(mine: Path, of: RunConfig, prepared: str, said: str) -> None:
    commit(mine, 9, of, prepared)
    found, passed_over = newest_whole(mine)
    assert found is not None and found.step == 2
    assert len(passed_over) == 1 and passed_over[0].startswith("step-00000009 passed over") and said in passed_over[0]
    assert [finding.kind for finding in glance(mine / "step-00000009").findings] == ["foreign"]


def test_our_own_are_not_let_go_for_another_runs(mine: Path) -> None:
    commit(mine, 9, config(seed=7))
    assert retention.prune(mine, Rules(keep=1), Alone()) == [1]
    planned = retention.plan(mine, Rules(keep=1))
    assert planned.steps == [] and steps(mine) == [2, 9]


def test_what_a_resume_may_change_makes_no_other_run(mine: Path) -> None:
    commit(mine, 3, config(model="/moved/there", max_steps=7, micro_batch_size=1))
    found, passed_over = newest_whole(mine)
    assert found is not None and found.step == 3 and not passed_over


def test_nothing_is_foreign_where_nobody_claimed(tmp_path: Path) -> None:
    commit(tmp_path, 1, config(seed=7))
    (tmp_path / "run.json").write_text("[")
    assert not glance(tmp_path / "step-00000001").findings


def test_one_run_at_a_time_writes_there(tmp_path: Path) -> None:
    with owner.claimed(tmp_path, config(), "data"):
        with pytest.raises(UsageError, match="another run writes its checkpoints there"):
            owner.claimed(tmp_path, config(seed=7), "data").__enter__()
        assert "7" not in re.findall(r'"seed": (\d+)', (tmp_path / "run.json").read_text())
    assert left_overs(tmp_path) == []


def test_nobody_takes_another_runs_directory(mine: Path) -> None:
    before = (mine / "run.json").read_bytes()
    with pytest.raises(UsageError, match=r"holds checkpoints of another run; .* train.seed 7 \(here 42\)"):
        owner.claimed(mine, config(seed=7), "data").__enter__()
    assert (mine / "run.json").read_bytes() == before
    with owner.claimed(mine, config(max_steps=9), "data"):
        commit(mine, 3, config(max_steps=9))
    assert not glance(mine / "step-00000003").findings


def test_a_save_keeps_another_runs_checkpoint_of_its_step(mine: Path) -> None:
    commit(mine, 3, config(seed=7))
    commit(mine, 3, config())
    found, passed_over = newest_whole(mine)
    assert found is not None and found.step == 3 and not passed_over
    assert [one.path.name.partition("-0000")[2][4:11] for one in left_overs(mine)] == [".foreig"]
    assert retention.prune(mine, Rules(keep=1), Alone()) == [1, 2]
    assert len(left_overs(mine)) == 1
