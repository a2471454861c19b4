"""Learning rates by step, in closed form."""

import math

import pytest

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
