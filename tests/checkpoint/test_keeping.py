"""Which checkpoints stay and why: decided from facts alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstune.checkpoint.keeping import Found, Rules, best_of, decide, presumed, surplus


def _facts(newest_whole: int | None, *steps: int, damaged: tuple[int, ...] = (), **values: float) -> list[Found]:
    return [
        Found(step, False if step in damaged else step == newest_whole or None, values.get(f"at_{step}"))
        for step in steps
    ]


def _goes(facts: list[Found], rules: Rules) -> list[int]:
    return surplus(decide(facts, rules))


@pytest.mark.parametrize(
    ("facts", "rules", "goes"),
    [
        (_facts(5, 1, 2, 3, 4, 5), Rules(keep=2), [1, 2, 3]),
        (_facts(3, 1, 2, 3, 4, 5), Rules(keep=2), [1]),
        (_facts(5, 5), Rules(keep=1), []),
        (_facts(None, 1, 2, 3), Rules(keep=1), []),
        (_facts(6, 1, 2, 3, 4, 5, 6), Rules(keep=1, keep_every=2), [1, 3, 5]),
        (_facts(4, 1, 2, 3, 4, at_1=3.0, at_2=1.0, at_3=2.0, at_4=2.5), Rules(keep=1, best="loss"), [1, 3]),
        (_facts(4, 1, 2, 3, 4, at_1=3.0, at_2=1.0, at_3=2.0), Rules(keep=1, best="f1", best_mode="max"), [2, 3]),
        (_facts(4, 1, 2, 3, 4, damaged=(3,)), Rules(keep=2), [1, 3]),
        (_facts(3, 1, 2, 3, damaged=(1,), at_1=0.1, at_2=0.2, at_3=0.3), Rules(keep=1, best="loss"), [1]),
        (_facts(3, 1, 2, 3, at_2=0.2), Rules(keep=1), [1, 2]),
    ],
)
def test_what_goes(facts: list[Found], rules: Rules, goes: list[int]) -> None:
    assert _goes(facts, rules) == goes


def test_the_reasons() -> None:
    facts = _facts(4, 5, 4, 3, 2, 1, damaged=(5,), at_2=0.5, at_4=1.0)
    verdicts = decide(facts, Rules(keep=2, keep_every=2, best="loss"))
    assert {verdict.step: verdict.reasons for verdict in verdicts} == {
        1: (),
        2: ("every 2", "best loss"),
        3: ("newest 2",),
        4: ("newest 2", "every 2"),
        5: ("newer than the newest whole one, step 4",),
    }
    assert [verdict.step for verdict in verdicts] == [1, 2, 3, 4, 5]


def test_of_two_equal_the_newer_is_the_best() -> None:
    assert best_of({1: 2.0, 2: 1.0, 3: 1.0, 4: None}, "min") == 3
    assert best_of({1: None}, "max") is None


def test_what_is_presumed_is_the_newest_that_may_be_whole() -> None:
    assert presumed(_facts(None, 1, 2, 3, damaged=(3,))) == [Found(1, None), Found(2, True), Found(3, False)]
    assert presumed(_facts(None, 1, damaged=(1,))) == [Found(1, False)]


_FACTS = st.lists(
    st.tuples(
        st.integers(1, 40), st.sampled_from([True, False, None]), st.none() | st.sampled_from([0.5, 1.0, 2.0])
    ).map(lambda fields: Found(*fields)),
    unique_by=lambda one: one.step,
)
_RULES = st.builds(
    Rules,
    keep=st.integers(1, 4),
    keep_every=st.none() | st.integers(1, 5),
    best=st.sampled_from([None, "loss"]),
    best_mode=st.sampled_from(["min", "max"]),
)


@given(_FACTS, _RULES)
def test_the_last_good_one_and_all_newer_ones_never_go(facts: list[Found], rules: Rules) -> None:
    goes = _goes(facts, rules)
    whole = [one.step for one in facts if one.whole]
    assert all(step < max(whole) for step in goes) if whole else goes == []
    staying = [one for one in facts if one.step not in goes]
    assert _goes(staying, rules) == [], "what was kept is kept again"
