"""Where a step's time goes, and the share of the arithmetic that it uses."""

import pytest
import torch

from dstune.training import phases
from dstune.training.phases import PhaseClock, Utilisation, peak_flops
from tests.planning.test_memory import BILLION


def test_a_phase_counts_all_of_its_times(monkeypatch):
    moments = iter([0.0, 1.5, 10.0, 10.25, 20.0, 24.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(moments))
    clock = PhaseClock(torch.device("cpu"))
    for name in ("forward", "forward", "backward"):
        with clock.phase(name):
            pass
    assert clock.seconds() == {"forward": 1.75, "backward": 4.0}


def test_utilisation_is_work_over_what_the_devices_could_do():
    counted = Utilisation(BILLION, peak=1e12)
    work = 6 * 900_000_000 * 1000 + 6 * 20 * 2048 * 50_000
    assert counted.mfu(tokens=1000, squares=50_000, seconds=2.0, world_size=4) == pytest.approx(work / (2.0 * 4 * 1e12))


def test_a_cpus_peak_is_what_its_matrix_products_reach():
    assert peak_flops(torch.device("cpu"), torch.float32) > 1e8
