"""Plots as SVG text, without a plotting library: lines and points on linear or logarithmic axes, and a waterfall."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 44, 96
# Told apart in grey and by people who see few colours too (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7a6a00")
MAX_SERIES = len(COLOURS)
PERCENTS = (0, 50, 75, 90, 95, 99, 99.9)


@dataclass(frozen=True)
class Series:
    """A named line; `is_line` false draws points only."""

    name: str
    points: Sequence[tuple[float, float]]
    is_line: bool = True


@dataclass(frozen=True)
class Axis:
    """One direction: its words, and how a value becomes a place from 0 to 1."""

    label: str
    low: float
    high: float
    is_log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()

    def place(self, value: float) -> float:
        """Where a value stands between the ends."""
        if self.is_log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def number(value: float) -> str:
    """A number as a reader wants it beside an axis."""
    size = abs(value)
    for limit, size_of_one, unit in (
        (1e15, 1e15, "P"),
        (1e12, 1e12, "T"),
        (1e9, 1e9, "G"),
        (1e6, 1e6, "M"),
        (1e4, 1e3, "k"),
    ):
        if size >= limit:
            return f"{value / size_of_one:.3g}{unit}"
    return f"{value:.4g}" if size >= 1 or size == 0 else f"{value:.2g}"


def linear_axis(label: str, highest: float) -> Axis:
    """From 0 to a round number, with about five ticks."""
    highest = highest if highest > 0 else 1.0
    raw = highest / 5
    size = 10 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)
    count = math.ceil(highest / step - 1e-9)
    return Axis(label, 0.0, count * step, ticks=tuple((n * step, number(n * step)) for n in range(count + 1)))


def log_axis(label: str, lowest: float, highest: float) -> Axis:
    """Whole decades around the values."""
    first, last = math.floor(math.log10(lowest)), math.ceil(math.log10(highest))
    last = max(last, first + 1)
    ticks = tuple((10.0**n, number(10.0**n)) for n in range(first, last + 1))
    return Axis(label, 10.0**first, 10.0**last, is_log=True, ticks=ticks)


def value_axis(label: str, values: Sequence[float]) -> Axis:
    """From 0, or in decades where the largest value would press the others to the ground."""
    positive = [value for value in values if value > 0 and math.isfinite(value)]
    if positive and max(positive) > 40 * min(positive):
        return log_axis(label, min(positive), max(positive))
    return linear_axis(label, max(positive, default=1.0))


def percent_axis() -> Axis:
    """Percentiles, drawn so that each further nine gets the same room."""
    ticks = tuple((_nines(percent), f"p{percent:g}") for percent in PERCENTS)
    return Axis("percentile of requests", 0.0, _nines(PERCENTS[-1]), ticks=ticks)


def _nines(percent: float) -> float:
    return -math.log10(1 - percent / 100)


def percentile_points(values: Sequence[float]) -> list[tuple[float, float]]:
    """A curve over `percent_axis`; it ends where there are too few values to say more."""
    ordered = sorted(values)
    n = len(ordered)
    highest = _nines(PERCENTS[-1])
    points = [(_nines(100 * rank / n), value) for rank, value in enumerate(ordered)]
    points = [point for point in points if point[0] <= highest]
    step = max(1, len(points) // 300)
    return [*points[:-1:step], points[-1]] if points else []


def _head(title: str, width: int, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title, quote=True)}" font-family="system-ui, sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="16" y="24" font-size="15" font-weight="600" fill="#1a1a1a">{escape(title)}</text>',
    ]


def lines(title: str, x: Axis, y: Axis, series: Sequence[Series]) -> str:
    """Return a plot of the series; points outside the axes are left out."""
    shown = list(series)[:MAX_SERIES]
    legend_rows = -(-len(shown) // 3)
    height = HEIGHT - 26 + max(0, legend_rows - 1) * 18
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = _head(title, WIDTH, height)
    for value, words in y.ticks:
        at = TOP + tall * (1 - y.place(value))
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + wide}" y1="{at:.1f}" y2="{at:.1f}" stroke="#e3e3e3"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="#444">{escape(words)}</text>')
    for value, words in x.ticks:
        at = LEFT + wide * x.place(value)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{TOP + tall}" stroke="#f0f0f0"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{TOP + tall + 18}" text-anchor="middle" fill="#444">{escape(words)}</text>'
        )
    parts.append(f'<path d="M{LEFT} {TOP}V{TOP + tall}H{LEFT + wide}" fill="none" stroke="#888"/>')
    parts.append(f'<text x="{LEFT + wide / 2}" y="{TOP + tall + 38}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(
        f'<text transform="translate(18 {TOP + tall / 2}) rotate(-90)" text-anchor="middle">{escape(y.label)}</text>'
    )
    for index, each in enumerate(shown):
        colour = COLOURS[index]
        places = [
            (LEFT + wide * x.place(a), TOP + tall * (1 - y.place(b)))
            for a, b in each.points
            if math.isfinite(a) and math.isfinite(b) and (not x.is_log or a > 0) and (not y.is_log or b > 0)
        ]
        places = [(a, b) for a, b in places if LEFT - 1 <= a <= LEFT + wide + 1 and TOP - 1 <= b <= TOP + tall + 1]
        if each.is_line and len(places) > 1:
            path = "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
            parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-linejoin="round"/>')
        if len(places) <= 40:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>' for a, b in places]
        left, top = LEFT + (index % 3) * (wide // 3), TOP + tall + 60 + (index // 3) * 18
        parts.append(f'<rect x="{left}" y="{top - 9}" width="14" height="4" rx="2" fill="{colour}"/>')
        name = each.name if len(each.name) <= 34 else each.name[:33] + "…"
        parts.append(f'<text x="{left + 20}" y="{top - 3}" fill="#222">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"])


def waterfall(title: str, unit: str, steps: Sequence[tuple[str, float]]) -> str:
    """Return bars that each begin where the one before ended, and their sum; the first step is the baseline."""
    row, left = 30, 250
    total = sum(value for _, value in steps)
    wide = WIDTH - left - 96
    height = 56 + row * (len(steps) + 1) + 8
    # A step may make things faster; then its bar runs to the left.
    ends = [sum(value for _, value in steps[: n + 1]) for n in range(len(steps))]
    scale = wide / max([*ends, total, 1e-9])
    parts = _head(title, WIDTH, height)
    for index, ((name, value), end) in enumerate(zip(steps, ends, strict=True)):
        top = 44 + index * row
        start = min(end - value, end)
        colour = "#8a8f98" if index == 0 else COLOURS[0] if value >= 0 else COLOURS[2]
        parts += [
            f'<text x="{left - 12}" y="{top + 15}" text-anchor="end" fill="#222">{escape(name)}</text>',
            f'<rect x="{left + start * scale:.1f}" y="{top}" width="{max(abs(value) * scale, 1):.1f}" height="20" '
            f'rx="2" fill="{colour}"/>',
            f'<text x="{left + max(start, end, start + abs(value)) * scale + 8:.1f}" y="{top + 15}" fill="#222">'
            f"{'' if index == 0 or value < 0 else '+'}{number(value)} {escape(unit)}</text>",
            f'<line x1="{left + end * scale:.1f}" x2="{left + end * scale:.1f}" y1="{top}" y2="{top + row}" '
            f'stroke="#999" stroke-dasharray="2 2"/>',
        ]
    top = 44 + len(steps) * row
    parts += [
        f'<text x="{left - 12}" y="{top + 15}" text-anchor="end" font-weight="600">together</text>',
        f'<rect x="{left}" y="{top}" width="{max(total * scale, 1):.1f}" height="20" rx="2" fill="#1a1a1a"/>',
        f'<text x="{left + total * scale + 8:.1f}" y="{top + 15}" font-weight="600">{number(total)} {escape(unit)}'
        "</text>",
    ]
    return "\n".join([*parts, "</svg>"])
