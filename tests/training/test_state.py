"""The small state: counts across skips, and what a resume refuses."""

import json

import pytest

from dstune.errors import CheckpointError
from dstune.training.state import TrainState

START = TrainState(prepared_fingerprint="f", seed=1, global_batch_size=4, total_steps=10)


def test_skipped_steps_keep_their_number_and_are_listed() -> None:
    state = START.after(2.0, False, 1).after(None, True, 1).after(None, True, 1).after(1.5, False, 2)
    assert (state.step, state.optimizer_steps, state.skipped, state.nonfinite_in_a_row) == (4, 2, [2, 3], 0)
    assert state.losses == [2.0, 1.5]
    assert START.after(None, True, 0).after(None, True, 0).nonfinite_in_a_row == 2
    searching = START.after(None, True, 0).after(None, True, 0, searching=True)
    assert (searching.skipped, searching.nonfinite_in_a_row) == ([1, 2], 1)


def test_state_goes_through_json_and_takes_the_new_runs_length() -> None:
    saved = json.loads(json.dumps(START.after(2.0, False, 1).to_json()))
    longer = TrainState(prepared_fingerprint="f", seed=1, global_batch_size=4, total_steps=99)
    assert longer.resumed(saved, "here") == TrainState(
        prepared_fingerprint="f", seed=1, global_batch_size=4, total_steps=99, step=1, optimizer_steps=1, losses=[2.0]
    )


@pytest.mark.parametrize("name", ["prepared_fingerprint", "seed", "global_batch_size"])
def test_another_order_is_refused(name: str) -> None:
    saved = START.to_json() | {name: "other"}
    with pytest.raises(CheckpointError, match=name):
        START.resumed(saved, "here")


def test_a_state_of_another_format_is_refused() -> None:
    with pytest.raises(CheckpointError, match="format"):
        START.resumed(START.to_json() | {"format": 99}, "here")


def test_other_frozen_weights_are_refused_and_old_states_are_read() -> None:
    with pytest.raises(CheckpointError, match=r"train.freeze.*\n.*`model.path`"):
        START.resumed(START.to_json() | {"frozen": "another digest"}, "here")
    old = START.to_json()
    del old["frozen"]
    assert START.resumed(old, "here") == START
