"""Losses and gradients that are not finite: counted, named, skipped, and the end after too many."""

from pathlib import Path

import pytest

from dstune.launch import rundir
from tests.runs.tiny import drive, weights_hash, write_run
from tests.spawn import read_lines


@pytest.mark.dist
def test_a_diverging_run_names_its_examples_commits_nothing_bad_and_is_not_tried_again(tmp_path: Path) -> None:
    run = write_run(
        tmp_path,
        train={"lr": 1e25, "warmup_steps": 0, "nonfinite_limit": 3, "max_grad_norm": 0.0},
        checkpoint={"every": 1},
    )
    end = drive(run, 2, new=True, max_failures=3)
    assert (end.state, end.exit_status) == ("failed", 1)
    assert "3 steps in a row" in end.message
    paths = rundir.find(run)
    events = read_lines(paths.events)
    assert len([e for e in events if e["event"] == "attempt_started"]) == 1
    skips = [e for e in events if e["event"] == "skip"]
    assert len(skips) == 3
    assert all(example["source"] == "builtin:instructions" and example["line"] > 0 for example in skips[0]["examples"])
    records = read_lines(paths.metrics)
    assert [record["skipped"] for record in records[-3:]] == [True] * 3
    committed = [e["step"] for e in events if e["event"] == "commit"]
    first_skip = records[-3]["step"]
    # Skipped steps change no weights: what was committed behind them is the last good state.
    assert len({weights_hash(paths, step) for step in committed if step >= first_skip - 1}) == 1
