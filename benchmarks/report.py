"""Results as one HTML file that needs nothing else: what was measured, on what, tables and plots.

strongroom bench report serve.json gateway.json --html report.html
"""

from __future__ import annotations

import argparse
import json
import sys
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.plots import (
    MAX_SERIES,
    Series,
    linear_axis,
    lines,
    log_axis,
    percent_axis,
    percentile_points,
    value_axis,
    waterfall,
)
from benchmarks.result import Measure, Result, ResultError, load_result

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MAX_ROWS = 400
# Longer tables are folded away, so that what a result says in one line is not below three screens of rows.
OPEN_ROWS = 16
MEANINGS = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "itl": "time between events with text",
    "e2e": "time to the last event",
}
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fafafa;margin:0}
main{max-width:1320px;margin:0 auto;padding:24px 20px 60px}
h1{font-size:26px;margin:8px 0 2px}h2{font-size:20px;margin:40px 0 6px;border-top:1px solid #ddd;padding-top:24px}
p{margin:4px 0 12px}.facts{color:#555;font-size:13px}
figure{margin:0;background:#fff;border:1px solid #e3e3e3;border-radius:6px;padding:6px;overflow-x:auto}
figure svg{display:block;max-width:100%;height:auto;margin:0 auto}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(560px,100%),1fr));gap:14px;margin:16px 0}
.table{overflow-x:auto;margin:14px 0;border:1px solid #e3e3e3;border-radius:6px;background:#fff}
table{border-collapse:collapse;font-size:13px;width:100%;font-variant-numeric:tabular-nums}
th{position:sticky;top:0;background:#f1f3f5;text-align:right;font-weight:600}
th,td{padding:5px 10px;border-bottom:1px solid #eee;text-align:right;white-space:nowrap}
.words{text-align:left}
details{margin:10px 0}summary{cursor:pointer;color:#0b5c8a}
pre{font-size:12px;overflow-x:auto;background:#fff;padding:10px;border:1px solid #e3e3e3;border-radius:6px}
"""


def write_html(results: Sequence[Result], path: Path) -> None:
    """Write the report."""
    path.write_text(to_html(results), encoding="utf-8")


def to_html(results: Sequence[Result]) -> str:
    """The report as text; it loads nothing and runs nothing."""
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Strongroom benchmarks</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{STYLE}</style></head><body><main><h1>Strongroom benchmarks</h1>",
        f"<p>{len(results)} result{'s' if len(results) != 1 else ''}. Lower is better for times, higher for rates; "
        "intervals hold 95 % of bootstrap resamples.</p>",
    ]
    for result in results:
        parts += _section(result)
    return "\n".join([*parts, "</main></body></html>", ""])


def _section(result: Result) -> list[str]:
    machine = result.machine
    gpus = ", ".join(f"{d.get('name')} (driver {d.get('driver')})" for d in result.devices) or "no GPU"
    memory_gib = (machine.get("memory_bytes") or 0) / 2**30
    cpus = machine.get("num_cpus", "?")
    facts = (
        f"{result.time} · commit {result.commit} · {machine.get('cpu', '?')}, {cpus} CPU{'' if cpus == 1 else 's'}, "
        f"{memory_gib:.0f} GiB · {gpus} · Python {machine.get('python', '?')}"
    )
    parts = [f"<h2>{escape(result.benchmark)}</h2>", f'<p class="facts">{escape(facts)}</p>']
    figures = [f"<figure>{svg}</figure>" for svg in _plots(result)]
    if figures:
        parts.append(f'<div class="plots">{"".join(figures)}</div>')
    with_interval = [_measure_row(m) for m in result.measures if m.interval is not None]
    others = [_measure_row(m) for m in result.measures if m.interval is None]
    parts += _folded("measure{s} with intervals", with_interval, is_open=len(with_interval) <= OPEN_ROWS)
    parts += _folded("row{s}", result.rows, is_open=len(result.rows) <= OPEN_ROWS)
    parts += _folded("total{s}", others, is_open=not result.rows)
    settings = json.dumps({"settings": result.settings, "versions": result.versions}, indent=1, default=str)
    parts.append(f"<details><summary>settings and versions</summary><pre>{escape(settings)}</pre></details>")
    return parts


def _folded(what: str, rows: Sequence[Mapping[str, Any]], *, is_open: bool) -> list[str]:
    if not rows:
        return []
    words = f"{len(rows)} {what.format(s='' if len(rows) == 1 else 's')}"
    return [f"<details{' open' if is_open else ''}><summary>{words}</summary>{_table(rows)}</details>"]


def _measure_row(measure: Measure) -> dict[str, Any]:
    labels = ", ".join(f"{name} {value}" for name, value in measure.labels.items())
    row: dict[str, Any] = {
        "measure": f"{measure.name} {measure.statistic}",
        "of": labels,
        "value": _number(measure.value),
    }
    if measure.interval is not None:
        row["95 %"] = f"{_number(measure.interval[0])} to {_number(measure.interval[1])}"
    return row | {"unit": measure.unit}


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name, value in row.items() if value not in (None, "")))
    words = {name for row in rows for name, value in row.items() if isinstance(value, str)} - {"value"}
    kinds = {name: ' class="words"' if name in words else "" for name in names}
    head = "".join(f"<th{kinds[name]}>{escape(name.replace('_', ' '))}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td{kinds[name]}>{escape(_number(row.get(name)))}</td>" for name in names) + "</tr>"
        for row in rows[:MAX_ROWS]
    )
    more = f"<p>{len(rows) - MAX_ROWS} more rows in the JSON.</p>" if len(rows) > MAX_ROWS else ""
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{more}'


def _plots(result: Result) -> Iterable[str]:
    yield from _rate_plots(result)
    yield from _percentile_plots(result)
    yield from waterfalls(result)
    yield from _rooflines(result)
    yield from _time_plots(result)


def _rate_plots(result: Result) -> Iterable[str]:
    """Throughput against latency, where the same thing was measured at several rates."""
    rows = [row for row in result.rows if "rate" in row and "requests_per_s" in row]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get("settings", "")), []).append(row)
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    if not groups:
        return
    for name in ("ttft", "tpot", "e2e"):
        if len(groups) == 1:
            ((_, group),) = groups.items()
            series = [_rate_series(group, f"{name}_{p}_ms", p) for p in ("p50", "p90", "p99")]
        else:
            series = [
                _rate_series(group, f"{name}_p90_ms", which) for which, group in list(groups.items())[:MAX_SERIES]
            ]
        series = [each for each in series if each.points]
        if not series:
            continue
        highest_x = max(x for each in series for x, _ in each.points)
        which = "" if len(groups) == 1 else ", p90"
        yield lines(
            f"Throughput against {MEANINGS[name]}{which}",
            linear_axis("answered requests a second", highest_x),
            value_axis("ms", [y for each in series for _, y in each.points]),
            series,
        )


def _rate_series(group: Sequence[Mapping[str, Any]], field: str, name: str) -> Series:
    points = sorted((float(row["requests_per_s"]), float(row[field])) for row in group if row.get(field) is not None)
    return Series(name, points)


def _percentile_plots(result: Result) -> Iterable[str]:
    """How bad the worst requests are."""
    for name, meaning in MEANINGS.items():
        found = [m for m in result.measures if m.name == name and m.values and m.unit == "ms"]
        if not found:
            continue
        # Of many settings the outermost and some between them; eight lines are what a plot can hold.
        step = max(1, -(-len(found) // MAX_SERIES))
        series = [
            Series(", ".join(f"{k} {v}" for k, v in m.labels.items()) or name, percentile_points(m.values or ()))
            for m in found[::step]
        ]
        yield lines(
            f"Percentiles of the {meaning}",
            percent_axis(),
            value_axis("ms", [y for each in series for _, y in each.points]),
            series,
        )


def waterfalls(result: Result) -> Iterable[str]:
    """What each control costs."""
    for fall in result.details.get("waterfalls", ()):
        steps = [(str(step["name"]), float(step["value"])) for step in fall["steps"]]
        yield waterfall(str(fall["title"]), str(fall["unit"]), steps)


def _rooflines(result: Result) -> Iterable[str]:
    """How near kernels come to what the device allows: `{"title", "peak_flops", "peak_bytes_per_s", "points"}`."""
    for roof in result.details.get("rooflines", ()):
        flops, bandwidth = float(roof["peak_flops"]), float(roof["peak_bytes_per_s"])
        points = [(str(p["name"]), float(p["flops_per_byte"]), float(p["flops"])) for p in roof["points"]]
        points = [point for point in points if point[1] > 0 and point[2] > 0]
        if not points:
            continue
        ridge = flops / bandwidth
        x = log_axis(
            "operations for each byte moved", min(p[1] for p in points) / 2, max(ridge * 4, *(p[1] for p in points))
        )
        roofline = [(x.low, x.low * bandwidth), (ridge, flops), (x.high, flops)]
        y = log_axis("operations a second", min(*(p[2] for p in points), x.low * bandwidth), flops * 2)
        series = [Series("what the device allows", roofline)]
        series += [Series(name, [(a, b)], is_line=False) for name, a, b in points[: MAX_SERIES - 1]]
        yield lines(str(roof["title"]), x, y, series)


def _time_plots(result: Result) -> Iterable[str]:
    """What a long run shows minute by minute."""
    rows = [row for row in result.rows if isinstance(row.get("minute"), (int, float))]
    if len(rows) < 2:
        return
    for title, ending in (("Latency", "_ms"), ("Memory", "_mib")):
        names = [name for name in rows[0] if name.endswith(ending)]
        series = [
            Series(name.removesuffix(ending), [(row["minute"], row[name]) for row in rows if row.get(name) is not None])
            for name in names
        ]
        if series:
            yield lines(
                f"{title} over the run",
                linear_axis("minutes", max(row["minute"] for row in rows)),
                value_axis("MiB" if ending == "_mib" else "ms", [y for each in series for _, y in each.points]),
                series,
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="strongroom bench report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="JSON files written by benchmarks")
    parser.add_argument("--html", type=Path, required=True, help="write the report here")
    args = parser.parse_args(argv)
    try:
        results = [load_result(path) for path in args.results]
    except ResultError as err:
        print(err, file=sys.stderr)
        return 2
    write_html(results, args.html)
    return 0


if __name__ == "__main__":
    sys.exit(main())
