"""How sure a figure is: 95% intervals over the examples."""

import math
from collections.abc import Callable, Mapping

import numpy as np

_Z = 1.959963984540054
_RESAMPLES = 1000
_SEED = 20260


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share of `n` yes-or-no outcomes; unlike p ± 1.96 s/√n it is right near 0 and 1."""
    p = successes / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(rows: np.ndarray, finish: Callable[[np.ndarray], Mapping[str, float]]) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap of a figure made from summed statistics: `rows` [n, k] float, `finish` of a [k] sum.

    The whole corpus figure is made anew from each of 1,000 resamples of the examples, drawn by a fixed seed.
    """
    generator = np.random.default_rng(_SEED)
    n = len(rows)
    drawn: dict[str, list[float]] = {}
    for _ in range(_RESAMPLES):
        weights = np.bincount(generator.integers(0, n, n), minlength=n)
        for name, value in finish(weights @ rows).items():
            drawn.setdefault(name, []).append(value)
    return {
        name: (float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))) for name, values in drawn.items()
    }
