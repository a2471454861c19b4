"""The decision between attempts, over every kind of end."""

import itertools

import pytest

from dstune.launch.attempts import RESIZE, Again, DriveLimits, Facts, Stop, Wait, can_grow, decide

LIMITS = DriveLimits(workers_wanted=4, workers_min=2, max_failures=3, settle_seconds=20, wait_seconds=600)


def facts(**changes):
    base = {
        "ended": "not_started",
        "stop_reason": None,
        "cause_status": None,
        "failures_in_a_row": 0,
        "workers_available": 4,
        "waited_seconds": 0.0,
    }
    return Facts(**(base | changes))


def test_starts_with_the_wanted_world_and_never_more():
    assert decide(facts(), LIMITS) == Again(4)
    assert decide(facts(workers_available=9), LIMITS) == Again(4)


def test_success_ends_it_whatever_else_is_true():
    for stop, failures in itertools.product((None, "stop", RESIZE), (0, 9)):
        end = decide(facts(ended="succeeded", stop_reason=stop, failures_in_a_row=failures, cause_status=2), LIMITS)
        assert isinstance(end, Stop) and (end.state, end.exit_status) == ("succeeded", 0)


@pytest.mark.parametrize("ended", ["failed", "lost"])
@pytest.mark.parametrize("status", [1, 2, 3, 4])
def test_an_error_that_would_come_again_is_not_tried_again(ended, status):
    end = decide(facts(ended=ended, cause_status=status, failures_in_a_row=1), LIMITS)
    assert isinstance(end, Stop) and (end.state, end.exit_status) == ("failed", status)


@pytest.mark.parametrize("ended", ["failed", "lost"])
def test_other_failures_are_tried_again_up_to_the_limit(ended):
    for failures in (1, 2, 3):
        assert decide(facts(ended=ended, failures_in_a_row=failures), LIMITS) == Again(4)
    end = decide(facts(ended=ended, failures_in_a_row=4), LIMITS)
    assert isinstance(end, Stop) and (end.state, end.exit_status) == ("failed", 1) and "4 attempts" in end.why


def test_no_restart_where_none_is_allowed():
    end = decide(facts(ended="failed", failures_in_a_row=1), DriveLimits(1, 1, max_failures=0))
    assert isinstance(end, Stop) and end.exit_status == 1


@pytest.mark.parametrize("ended", ["not_started", "stopped", "failed", "lost"])
@pytest.mark.parametrize(
    ("reason", "state"),
    [("stop", "stopped"), ("interrupt", "stopped"), ("terminate", "stopped"), ("preempted", "preempted")],
)
def test_a_stop_that_was_asked_for_is_resumable(ended, reason, state):
    end = decide(facts(ended=ended, stop_reason=reason, failures_in_a_row=9), LIMITS)
    assert isinstance(end, Stop) and (end.state, end.exit_status) == (state, 75)


def test_workers_that_stop_by_themselves_are_resumable():
    end = decide(facts(ended="stopped"), LIMITS)
    assert isinstance(end, Stop) and (end.state, end.exit_status) == ("stopped", 75)


@pytest.mark.parametrize("ended", ["stopped", "failed"])
def test_a_resize_goes_on(ended):
    assert decide(facts(ended=ended, stop_reason=RESIZE, failures_in_a_row=1), LIMITS) == Again(4)


def test_a_smaller_world_after_the_settling_time():
    assert isinstance(decide(facts(ended="failed", failures_in_a_row=1, workers_available=3), LIMITS), Wait)
    later = facts(ended="failed", failures_in_a_row=1, workers_available=3, waited_seconds=20)
    assert decide(later, LIMITS) == Again(3)


def test_too_few_workers_wait_and_then_give_up_as_no_fit():
    for waited in (0, 20, 599):
        assert isinstance(decide(facts(workers_available=1, waited_seconds=waited), LIMITS), Wait)
    end = decide(facts(workers_available=1, waited_seconds=600), LIMITS)
    assert isinstance(end, Stop) and end.exit_status == 4 and "1 of 4" in end.why


def test_a_fixed_world_never_shrinks():
    fixed = DriveLimits(workers_wanted=4, workers_min=4)
    assert isinstance(decide(facts(workers_available=3, waited_seconds=100), fixed), Wait)


def test_growing_wants_room_and_patience():
    assert can_grow(2, 1, 120, LIMITS)
    assert not can_grow(4, 8, 120, LIMITS)
    assert not can_grow(2, 0, 120, LIMITS)
    assert not can_grow(2, 1, 119, LIMITS)


def test_worlds_are_whole_groups_of_workers_that_share_rows():
    grouped = DriveLimits(workers_wanted=8, workers_min=4, group=4)
    for available in (4, 7):
        later = facts(ended="failed", failures_in_a_row=1, workers_available=available, waited_seconds=30)
        assert decide(later, grouped) == Again(4)
    assert isinstance(decide(facts(workers_available=3, waited_seconds=30), grouped), Wait)
    assert not can_grow(4, 3, 120, grouped) and can_grow(4, 4, 120, grouped)


def test_every_combination_has_a_decision():
    ends = ("not_started", "succeeded", "stopped", "failed", "lost")
    reasons = (None, "stop", "preempted", RESIZE)
    for ended, reason, status, failures, available, waited in itertools.product(
        ends, reasons, (None, 1, 2, 3, 4), (0, 1, 4), (0, 1, 2, 4), (0.0, 30.0, 900.0)
    ):
        decision = decide(Facts(ended, reason, status, failures, available, waited), LIMITS)
        if isinstance(decision, Again):
            assert LIMITS.workers_min <= decision.world_size <= min(available, LIMITS.workers_wanted)
            assert ended != "succeeded" and reason in (None, RESIZE)
        if isinstance(decision, Stop):
            assert (decision.exit_status == 0) == (decision.state == "succeeded")
            assert (decision.exit_status == 75) == (decision.state in ("stopped", "preempted"))
