"""Write what is known of the kernels on this machine: JSON, and one HTML page with its pictures inside.

    strongroom bench kernels --out FOLDER

On a GPU it times every kernel beside the best library call. Without one it compiles for every target, counts the
machine code and derives bounds from it; everything derived is called so. `strongroom bench report FOLDER/kernels.json`
draws the rooflines.
"""

from __future__ import annotations

import argparse
import html
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import cases, derived, measure
from benchmarks.kernels.roofline import to_result
from benchmarks.result import to_json, write_result
from serving_kernels.launch import INTERPRETED

_BAR_WIDTH = 420
_ROW_HEIGHT = 22
_LABEL_WIDTH = 250
_STYLE = (
    "body{font:14px/1.45 system-ui,sans-serif;max-width:1000px;margin:2rem auto;padding:0 1rem;color:#1d2733}"
    "table{border-collapse:collapse;width:100%;margin:.6rem 0 1.6rem}td,th{padding:.25rem .5rem;text-align:right;"
    "border-bottom:1px solid #dde3ea}td:first-child,th:first-child{text-align:left}.note{color:#566577}"
    "svg text{font:12px system-ui,sans-serif;fill:#1d2733}h2{margin-top:2.2rem}"
)
_COLOURS = {"instructions": "#c2571a", "memory": "#2f6db5", "link": "#8a97a6"}


def collect() -> dict[str, Any]:
    """Return everything: static counts, derived bounds, and measurements where there is a GPU."""
    static = derived.static_counts()
    has_device = torch.cuda.is_available() and not INTERPRETED
    measured: list[dict[str, Any]] = []
    if has_device:
        for case in cases.serving_cases(torch.device("cuda")):
            measured += measure.measure(case)
    return {
        "kind": "measured" if has_device else "derived",
        "environment": measure.environment(),
        "assumed_devices": [asdict(device) for device in derived.DEVICES],
        "assumed_lanes_per_clock": derived.LANES,
        "static": static,
        "derived": derived.derive(static),
        "measured": measured,
    }


def render(results: dict[str, Any]) -> str:
    """Return the page; it needs nothing beside itself."""
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Kernels</title>",
        f"<style>{_STYLE}</style><h1>GPU kernels</h1>",
        f"<p class='note'>{html.escape(_provenance(results))}</p>",
    ]
    if results["measured"]:
        parts.append("<h2>Measured</h2>" + _measured_table(results["measured"]))
    parts.append(
        "<h2>Derived bounds</h2><p class='note'>Derived, not measured: the busiest pipe by instruction count "
        f"(lanes a clock assumed: {html.escape(json.dumps(results['assumed_lanes_per_clock']))}) and the data sheet's "
        "memory bandwidth. At these lanes and the assumed clock a kernel can only be slower than its lower bar.</p>"
    )
    parts += [_device_picture(device, results["derived"]) for device in results["assumed_devices"]]
    parts.append("<h2>Machine code</h2>" + _static_table(results["static"]))
    return "\n".join(parts) + "</html>\n"


def _provenance(results: dict[str, Any]) -> str:
    found = ", ".join(f"{name} {value}" for name, value in results["environment"].items() if value)
    where = "Timed on a GPU." if results["measured"] else "No GPU: nothing here was timed."
    return f"{where} {found}"


def _device_picture(device: dict[str, Any], bounds: list[dict[str, Any]]) -> str:
    rows = [b for b in bounds if b["device"] == device["name"]]
    height = _ROW_HEIGHT * (len(rows) + 1) + 8
    top = max((b["memory"] for b in rows), default=1.0)
    drawn = [f"<h3>{html.escape(device['name'])}</h3><svg width='960' height='{height}' role='img'>"]
    for number, b in enumerate(rows):
        y = 4 + number * _ROW_HEIGHT
        memory = _length(b["memory"], top)
        drawn.append(f"<text x='0' y='{y + 13}'>{html.escape(b['kernel'])}</text>")
        drawn.append(_bar(y + 1, memory, 6, _COLOURS["memory"]))
        if b["compute"] is not None:
            drawn.append(_bar(y + 8, _length(b["compute"], top), 6, _COLOURS["instructions"]))
        text = f"≤ {b['rate']:,.0f}e9 {b['unit']}/s; {b['limit']}"
        drawn.append(f"<text x='{_LABEL_WIDTH + _BAR_WIDTH + 8}' y='{y + 13}'>{html.escape(text)}</text>")
    y = 4 + len(rows) * _ROW_HEIGHT
    drawn.append(f"<text x='0' y='{y + 13}'>PCIe link (bytes)</text>")
    drawn.append(_bar(y + 4, _length(device["link_gb_s"], top), 6, _COLOURS["link"]))
    drawn.append(f"<text x='{_LABEL_WIDTH + _BAR_WIDTH + 8}' y='{y + 13}'>{device['link_gb_s']:g} GB/s</text></svg>")
    drawn.append("<p class='note'>Blue: device memory. Orange: instructions. Lengths are logarithmic.</p>")
    return "".join(drawn)


def _length(value: float, top: float) -> float:
    """Length of a bar, logarithmic: 1e9 units a second is one pixel, `top` the whole width."""
    return max(1.0, _BAR_WIDTH * math.log10(max(value, 1.0)) / math.log10(max(top, 10.0)))


def _bar(y: float, length: float, height: int, colour: str) -> str:
    return f"<rect x='{_LABEL_WIDTH}' y='{y}' width='{length:.1f}' height='{height}' fill='{colour}'/>"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = ["<tr>" + "".join(f"<th>{html.escape(h)}</th>" for h in head) + "</tr>"]
    cells += ["<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return "<table>" + "".join(cells) + "</table>"


def _measured_table(measured: list[dict[str, Any]]) -> str:
    head = ["kernel", "contender", "shape", "p20 ms", "p50 ms", "p80 ms", "GB/s"]
    times = ("p20_ms", "p50_ms", "p80_ms")
    return _table(
        head,
        [
            [m["kernel"], m["contender"], m["shape"], *(f"{m[t]:.4f}" for t in times), f"{m['gb_s']:,.0f}"]
            for m in measured
        ],
    )


def _static_table(static: list[dict[str, Any]]) -> str:
    head = ["kernel", "target", "registers", "spills", "shared bytes", "instructions", "in the loop"]
    rows = []
    for counts in static:
        loop = counts["loops"][0] if counts["loops"] else {}
        spills = str(counts["spill_instructions"]) if "spill_instructions" in counts else "–"
        numbers = [str(counts.get("registers", "–")), spills, str(counts.get("shared_bytes", "–"))]
        sizes = [str(sum(counts["instructions"].values())), str(sum(loop.values()) or "–")]
        rows.append([counts["kernel"], counts["target"], *numbers, *sizes])
    return _table(head, rows)


def main(argv: list[str] | None = None) -> int:
    """Collect and write; `strongroom bench kernels` is this."""
    parser = argparse.ArgumentParser(prog="strongroom bench kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("bench-kernels"), help="folder for kernels.json and kernels.html"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON as well")
    arguments = parser.parse_args(argv)
    results = collect()
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = to_result(results)
    write_result(result, arguments.out / "kernels.json")
    (arguments.out / "kernels.html").write_text(render(results), encoding="utf-8")
    if arguments.json:
        print(json.dumps(to_json(result), indent=1))
    else:
        print_summary(results)
        print(f"wrote {arguments.out / 'kernels.json'} and {arguments.out / 'kernels.html'}")
    return 0


def print_summary(results: dict[str, Any]) -> None:
    """Print one line a measurement, or a bound where there are none."""
    for m in results["measured"]:
        print(f"{m['kernel']:32} {m['contender']:22} {m['p50_ms']:9.4f} ms {m['gb_s']:8,.0f} GB/s  {m['shape']}")
    if not results["measured"]:
        print("No CUDA device: bounds derived from machine code and data sheets, nothing was timed.")
        for b in results["derived"]:
            print(f"{b['kernel']:32} {b['device']:16} <= {b['rate']:9,.0f}e9 {b['unit']}/s  ({b['limit']})")
