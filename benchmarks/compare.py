"""Whether B is worse than A, by more than a margin and more than chance.

    strongroom bench compare main.json branch.json --margin 5

For each measure that both have, the ratio B / A with its bootstrap interval. It is a regression when the whole interval
lies on the bad side of the margin; where a measure has no single values behind it, the ratio alone decides, and the
line says "no interval". Exit code 1: a regression; 2: the files can't be compared.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.intervals import ratio_interval
from benchmarks.result import Measure, Result, ResultError, load_result

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Comparison:
    """One measure of two results. `ratio` and `interval` are B / A."""

    key: str
    unit: str
    better: str
    a: float
    b: float
    ratio: float
    interval: tuple[float, float] | None
    verdict: str


def values_of(result: Result, measure: Measure) -> Sequence[float] | None:
    """The single values behind a measure; those of a latency stand once, beside its median."""
    if measure.values is not None:
        return measure.values
    if measure.statistic == "total":
        return None
    for other in result.measures:
        if other.name == measure.name and other.labels == measure.labels and other.values is not None:
            return other.values
    return None


def verdict_of(better: str, ratio: float, bounds: tuple[float, float] | None, margin: float) -> str:
    """`worse`, `better` or `same`, for a margin such as 0.05."""
    if not math.isfinite(ratio):
        return "unknown"
    low, high = bounds if bounds is not None and all(map(math.isfinite, bounds)) else (ratio, ratio)
    if better == "higher":
        low, high = -high, -low
        worse, improved = low > -(1 - margin), high < -(1 + margin)
    else:
        worse, improved = low > 1 + margin, high < 1 - margin
    return "worse" if worse else "better" if improved else "same"


def compare(a: Result, b: Result, *, margin: float) -> list[Comparison]:
    """Compare every measure that both have.

    Raises:
        ResultError: They are of different benchmarks, or have nothing in common.
    """
    if a.benchmark != b.benchmark:
        raise ResultError(f"results of different benchmarks can't be compared: '{a.benchmark}' and '{b.benchmark}'.")
    others = {measure.key: measure for measure in b.measures}
    found = []
    for measure in a.measures:
        other = others.get(measure.key)
        if other is None:
            continue
        bounds = None
        base, new = values_of(a, measure), values_of(b, other)
        if base and new and min(len(base), len(new)) > 1:
            bounds = ratio_interval(base, new, measure.statistic)
        if measure.value:
            ratio = other.value / measure.value
        else:
            ratio = 1.0 if other.value == 0 else math.inf if math.isfinite(other.value) else math.nan
        verdict = verdict_of(measure.better, ratio, bounds, margin)
        if ratio == math.inf:  # from nothing to something, such as errors where there were none
            verdict = "worse" if measure.better == "lower" else "better"
        found.append(
            Comparison(measure.key, measure.unit, measure.better, measure.value, other.value, ratio, bounds, verdict)
        )
    if not found:
        raise ResultError("the results have no measure in common; were they run with the same settings?")
    return found


def different_facts(a: Result, b: Result) -> list[str]:
    """What differs beside the commit, and makes a comparison doubtful."""
    pairs = [(name, a.machine.get(name), b.machine.get(name)) for name in ("cpu", "num_cpus", "memory_bytes", "python")]
    pairs.append(("devices", [d.get("name") for d in a.devices], [d.get("name") for d in b.devices]))
    names = sorted(set(a.settings) | set(b.settings))
    pairs += [(f"setting {name}", a.settings.get(name), b.settings.get(name)) for name in names]
    return [f"{name}: {one} and {other}" for name, one, other in pairs if one != other]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="strongroom bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("a", type=Path, help="the result that stands")
    parser.add_argument("b", type=Path, help="the result that may be worse")
    parser.add_argument("--margin", type=float, default=5.0, help="per cent that B may be worse (default 5)")
    parser.add_argument("--measure", nargs="*", help="only these names, such as ttft requests")
    args = parser.parse_args(argv)
    if not 0 <= args.margin < 100:
        parser.error("--margin is in per cent, at least 0 and below 100")
    try:
        a, b = load_result(args.a), load_result(args.b)
        rows = compare(a, b, margin=args.margin / 100)
    except ResultError as err:
        print(err, file=sys.stderr)
        return 2
    rows = [row for row in rows if not args.measure or row.key.split(" ")[0] in args.measure]
    if not rows:
        print(f"No measure is called {', '.join(args.measure)}.", file=sys.stderr)
        return 2
    for note in different_facts(a, b):
        print(f"note: different {note}", file=sys.stderr)
    for row in rows:
        sure = f"[{row.interval[0]:.3f}, {row.interval[1]:.3f}]" if row.interval else "no interval"
        print(f"{row.verdict:8} {row.ratio:8.3f} {sure:18} {row.key}: {row.a:.4g} -> {row.b:.4g} {row.unit}")
    worse = [row for row in rows if row.verdict == "worse"]
    print(f"{len(worse)} of {len(rows)} measures are worse by more than {args.margin:g} %.")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
