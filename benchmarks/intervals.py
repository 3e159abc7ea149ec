"""Percentiles, and bootstrap intervals that say how far another run of the same thing might be.

A percentile is the smallest value that at least so many per cent of the values do not exceed (nearest rank). The
bootstrap is the percentile bootstrap of Efron 1979 with a fixed seed: the same values give the same interval.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

RESAMPLES = 1000
MAX_DRAWS = 2_000_000  # for a mean: at most so many draws in all, or a long run would take longer to read than to make

Statistic = Callable[[Sequence[float]], float]


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of values that are in order already."""
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def _resampled_percentiles(ordered: Sequence[float], percent: float, rng: random.Random, rounds: int) -> list[float]:
    # The k-th smallest of n uniform draws is Beta(k, n - k + 1), so one draw gives the percentile of a whole resample.
    n = len(ordered)
    k = max(1, math.ceil(n * percent / 100))
    return [ordered[min(n - 1, int(n * rng.betavariate(k, n - k + 1)))] for _ in range(rounds)]


def _resampled_means(values: Sequence[float], rng: random.Random, rounds: int) -> list[float]:
    n = len(values)
    rounds = max(200, min(rounds, MAX_DRAWS // n))
    return [math.fsum(rng.choices(values, k=n)) / n for _ in range(rounds)]


def resampled(values: Sequence[float], statistic: str, *, seed: int = 0, rounds: int = RESAMPLES) -> list[float]:
    """What resamples of the values give for `mean` or `pN`, such as `p99`; unordered.

    Raises:
        ValueError: No values, or the statistic has another name.
    """
    if not values:
        raise ValueError("no values to resample")
    rng = random.Random(seed)
    if statistic == "mean":
        return _resampled_means(values, rng, rounds)
    return _resampled_percentiles(sorted(values), percent_of(statistic), rng, rounds)


def percent_of(statistic: str) -> float:
    """The number in `p99.9`.

    Raises:
        ValueError: It is not the name of a percentile.
    """
    try:
        percent = float(statistic.removeprefix("p"))
    except ValueError:
        percent = -1.0
    if not statistic.startswith("p") or not 0 <= percent <= 100:
        raise ValueError(f"'{statistic}' is not mean or p0 to p100")
    return percent


def statistic_of(values: Sequence[float], statistic: str) -> float:
    """The `mean` or the percentile `pN` of the values."""
    if statistic == "mean":
        return math.fsum(values) / len(values) if values else math.nan
    return percentile(sorted(values), percent_of(statistic))


def interval(values: Sequence[float], statistic: str, *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The bootstrap interval of a statistic of the values."""
    return _middle(resampled(values, statistic, seed=seed), level)


def ratio_interval(
    base: Sequence[float], new: Sequence[float], statistic: str, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """The bootstrap interval of `statistic(new) / statistic(base)`; the two were measured apart."""
    below = resampled(base, statistic, seed=seed)
    above = resampled(new, statistic, seed=seed + 1)
    rng = random.Random(seed + 2)
    ratios = [a / b for a, b in zip(rng.choices(above, k=RESAMPLES), rng.choices(below, k=RESAMPLES), strict=True) if b]
    return _middle(ratios, level) if ratios else (math.nan, math.nan)


def _middle(draws: list[float], level: float) -> tuple[float, float]:
    draws.sort()
    outside = (1 - level) / 2 * 100
    return percentile(draws, outside), percentile(draws, 100 - outside)
