"""Rates and differences with their 95 % intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_Z = 1.959964


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95 % interval; `num` is how many observations stand behind it, None for no value."""

    value: float | None
    low: float | None
    high: float | None
    num: int


def rate(hits: int, num: int) -> Estimate:
    """Return a share with its Wilson interval (Wilson 1927, without continuity correction)."""
    if num == 0:
        return Estimate(None, None, None, 0)
    share = hits / num
    spread = _Z * math.sqrt(share * (1 - share) / num + _Z**2 / (4 * num**2))
    middle, scale = share + _Z**2 / (2 * num), 1 + _Z**2 / num
    return Estimate(share, max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale), num)


def mean(values: Sequence[float]) -> Estimate:
    """Return a mean with its normal interval; no interval for a single value."""
    num = len(values)
    if num == 0:
        return Estimate(None, None, None, 0)
    middle = math.fsum(values) / num
    if num == 1:
        return Estimate(middle, None, None, 1)
    error = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (num - 1) / num)
    return Estimate(middle, middle - _Z * error, middle + _Z * error, num)


def paired_difference(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> Estimate:
    """Return the mean over items of (second - first), each item's seeds averaged first.

    Seeds of one item are not independent of each other, so the items are the observations.
    """
    both = [key for key in first if first[key] and second.get(key)]
    return mean([math.fsum(second[k]) / len(second[k]) - math.fsum(first[k]) / len(first[k]) for k in both])


def group_difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Return the difference of two groups' means (second - first) with its normal interval (Welch)."""
    if len(first) < 2 or len(second) < 2:
        return Estimate(None, None, None, len(first) + len(second))
    one, two = math.fsum(first) / len(first), math.fsum(second) / len(second)
    variance = sum(
        math.fsum((v - m) ** 2 for v in vs) / (len(vs) - 1) / len(vs) for vs, m in ((first, one), (second, two))
    )
    error = math.sqrt(variance)
    return Estimate(two - one, two - one - _Z * error, two - one + _Z * error, len(first) + len(second))
