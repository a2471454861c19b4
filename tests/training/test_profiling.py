"""`train.profile`: the steps that were asked for, and no others, are in the trace."""

import json

import pytest
import torch
from pydantic import ValidationError

from dstune.config.train import TrainSection
from dstune.training.profiling import Trace


def traced(tmp_path, first: int, last: int, steps: range) -> list[str]:
    file = tmp_path / "profile" / "rank-0.json"
    trace = Trace(first, last, file, torch.device("cpu"))
    for step in steps:
        trace.before(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(4, 4).sum()
        trace.after(step, end=step == steps[-1])
    if not file.exists():
        return []
    names = {event["name"] for event in json.loads(file.read_text())["traceEvents"] if event.get("name")}
    return sorted(name for name in names if name.startswith("step "))


def test_the_steps_that_were_asked_for_are_traced(tmp_path):
    assert traced(tmp_path, 2, 3, range(1, 6)) == ["step 2", "step 3"]


def test_a_run_that_ends_within_them_still_writes_its_trace(tmp_path):
    assert traced(tmp_path, 2, 9, range(1, 4)) == ["step 2", "step 3"]


def test_a_run_that_begins_behind_them_writes_none(tmp_path):
    assert traced(tmp_path, 2, 3, range(3, 5)) == []


def test_from_comes_before_to():
    with pytest.raises(ValidationError, match="from <= to"):
        TrainSection.model_validate({"profile": [3, 2]})
