"""Learning rates by step, in closed form."""

import math

import pytest
from pydantic import ValidationError

from dstune.config.train import TrainSection
from dstune.training.schedule import learning_rate, warmup_steps


def test_warmup_reaches_the_peak_at_its_last_step() -> None:
    train = TrainSection(lr=1.0, schedule="constant", warmup_steps=4)
    assert [learning_rate(train, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(3 * math.pi / 4))]),
    ],
)
def test_schedules_without_warmup(schedule: str, expected: list[float]) -> None:
    train = TrainSection.model_validate({"lr": 1.0, "schedule": schedule})
    assert [learning_rate(train, step, 4) for step in range(4)] == pytest.approx(expected)


def test_warmup_ratio_is_of_all_steps() -> None:
    assert warmup_steps(TrainSection(warmup_ratio=0.03), 100) == 3
    assert warmup_steps(TrainSection(warmup_ratio=0.03), 10) == 1
    assert warmup_steps(TrainSection(), 10) == 0


def test_every_rate_is_above_zero() -> None:
    for schedule in ("cosine", "linear", "constant"):
        train = TrainSection.model_validate({"schedule": schedule, "warmup_ratio": 0.1})
        assert all(learning_rate(train, step, 50) > 0 for step in range(50))


def test_wsd_stays_at_the_peak_and_falls_at_the_end() -> None:
    train = TrainSection(
        lr=1.0, schedule="wsd", warmup_steps=2, decay_ratio=0.4, min_lr_ratio=0.1, decay_shape="linear"
    )
    rates = [learning_rate(train, step, 10) for step in range(10)]
    assert rates == pytest.approx([0.5, *[1.0] * 6, 0.775, 0.55, 0.325])
    assert [learning_rate(train, step, 20) for step in range(12)] == [
        0.5,
        *[1.0] * 11,
    ]  # a longer run goes on at the peak
    root = train.model_copy(update={"decay_shape": "1-sqrt", "min_lr_ratio": 0.0})
    assert [learning_rate(root, step, 10) for step in (6, 7, 9)] == pytest.approx([1.0, 0.5, 1 - math.sqrt(0.75)])
    late = TrainSection(lr=1.0, schedule="wsd", warmup_steps=8, decay_ratio=0.5)  # the warm-up goes first
    assert [learning_rate(late, step, 10) for step in (3, 7, 8)] == [0.5, 1.0, 1.0]
    assert 0 < learning_rate(late, 9, 10) < 1


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_ends_above_its_floor(schedule: str) -> None:
    train = TrainSection.model_validate({"lr": 1.0, "schedule": schedule, "min_lr_ratio": 0.2})
    rates = [learning_rate(train, step, 1000) for step in range(1000)]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True)
    assert rates[500] == pytest.approx(0.6) and 0.2 < rates[-1] < 0.201


def test_what_does_not_belong_to_a_schedule_is_refused() -> None:
    wsd = TrainSection(schedule="wsd")
    assert (wsd.decay_ratio, wsd.decay_shape) == (0.2, "1-sqrt") and TrainSection(**wsd.model_dump()) == wsd
    assert TrainSection().decay_ratio is None
    for wrong, message in [
        ({"decay_ratio": 0.1}, "`decay_ratio` belongs to wsd, not to cosine"),
        ({"schedule": "linear", "decay_shape": "cosine"}, "`decay_shape` belongs to wsd, not to linear"),
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "constant never falls"),
        ({"schedule": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6}, "more than all steps together"),
    ]:
        with pytest.raises(ValidationError, match=message):
            TrainSection.model_validate(wrong)
