"""What a benchmark printed, as a result: each JSON object is a row, its numbers are measures where their names say so.

Names ending in `per_s` are better when higher, times (`_us`, `_ms`, `_s`, or so in brackets) when lower; other numbers
stay in the row alone.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from benchmarks.result import Measure, Result

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TIME = re.compile(r"(.*?)[_ ]\(?(ns|us|ms|s)\)?\Z")


def parse_rows(output: str) -> list[dict[str, Any]]:
    """Each JSON object of the output, one a line, or the whole of it as one object or list."""
    rows = []
    for line in output.splitlines():
        if line.startswith("{"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    if rows:
        return rows
    try:
        whole = json.loads(output)
    except ValueError:
        return []
    found = whole if isinstance(whole, list) else [whole]
    return [row for row in found if isinstance(row, dict)]


def measures_of(rows: Sequence[Mapping[str, Any]]) -> list[Measure]:
    """The numbers of rows; values that occur several times under the same name are the single values of one measure."""
    found: dict[tuple[str, str, str, tuple[tuple[str, str], ...]], list[float]] = {}
    for row in rows:
        labels = tuple((name, str(value)) for name, value in row.items() if isinstance(value, (str, bool)))
        for name, value in row.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            kind = _kind_of(name)
            if kind is not None:
                found.setdefault((*kind, labels), []).append(float(value))
    measures = []
    for (name, unit, better, labels), values in found.items():
        median = sorted(values)[(len(values) - 1) // 2]
        several = values if len(values) > 1 else None
        statistic = "p50" if several else "total"
        measures.append(Measure(name, unit, better, statistic, median, None, dict(labels), several))
    return measures


def _kind_of(name: str) -> tuple[str, str, str] | None:
    if name == "per_s" or name.endswith("_per_s"):
        return name.removesuffix("per_s").rstrip("_") or "rate", "1/s", "higher"
    matched = _TIME.match(name)
    return (matched[1], matched[2], "lower") if matched else None


def result_of(benchmark: str, arguments: Sequence[str], output: str) -> Result:
    """The result of a benchmark that prints rows.

    Raises:
        ValueError: It printed none.
    """
    rows = parse_rows(output)
    if not rows:
        raise ValueError(f"'{benchmark}' printed no JSON rows; does it want --json, or does it write a result itself?")
    return Result(benchmark, {"arguments": list(arguments)}, measures_of(rows), rows)
