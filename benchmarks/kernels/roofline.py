"""Where each kernel stands under a device's roofs: operations a second against operations for each byte it moves.

An operation is an instruction of one lane. The roofs are the data sheet's: lanes that issue in a clock, and memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.kernels.derived import DEVICES, LANES, Device
from benchmarks.result import Measure, Result, finish

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_GROUPS = {"opening and masking": ("chacha20", "poly1305", "token_mask"), "four bits": ("four_bit", "bitsandbytes")}


def rooflines(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what `strongroom bench report` draws: each device's derived points, and what was measured on it."""
    found = []
    for device in DEVICES:
        for title, beginnings in _GROUPS.items():
            points = [
                {"name": f"{b['kernel']}, derived", **_point(b, float(b["rate"]))}
                for b in results["derived"]
                if b["device"] == device.name and b["kernel"].startswith(beginnings) and b["instructions"]
            ]
            measured = _measured_points(results, device, beginnings)
            if points:
                what = "derived, and measured here" if measured else "derived, not measured"
                found.append(
                    {
                        "title": f"{device.name}, {title}: {what}",
                        "peak_flops": device.num_sms * device.clock_ghz * 1e9 * LANES["issue"],
                        "peak_bytes_per_s": device.memory_gb_s * 1e9,
                        "points": measured + points,
                    }
                )
    return found


def _point(bound: Mapping[str, Any], rate: float) -> dict[str, float]:
    """`rate` is in 1e9 units a second; the machine code says how many operations a unit takes."""
    operations = float(bound["instructions"])
    return {"flops_per_byte": operations / float(bound["bytes_moved"]), "flops": rate * 1e9 * operations}


def _measured_points(results: Mapping[str, Any], device: Device, beginnings: Sequence[str]) -> list[dict[str, Any]]:
    """Points of kernels that were timed on this device; of another one the roofs are not known."""
    if device.name.split()[0] not in str(results["environment"].get("device")):
        return []
    bounds = {b["kernel"]: b for b in results["derived"] if b["device"] == device.name and b["instructions"]}
    points = []
    for row in results["measured"]:
        bound = bounds.get(row["kernel"])
        if row["contender"] == "kernel" and bound and row["kernel"].startswith(tuple(beginnings)):
            rate = float(row["gb_s"]) / float(bound["bytes_moved"])
            points.append({"name": f"{row['kernel']}, {row['shape']}, measured", **_point(bound, rate)})
    return points


def to_result(results: Mapping[str, Any]) -> Result:
    """Return everything in the form of docs/specs/benchmark-results.md; a measure is only what was measured."""
    measures = [
        Measure(
            "time", "ms", "lower", statistic, row[f"{statistic}_ms"],
            labels={name: row[name] for name in ("kernel", "contender", "shape")},
        )
        for row in results["measured"]
        for statistic in ("p20", "p50", "p80")
    ]  # fmt: skip
    bounds = [
        {
            "kind": "derived", "kernel": b["kernel"], "device": b["device"], "unit": b["unit"],
            "at_most_1e9_per_s": b["rate"], "limit": b["limit"],
        }
        for b in results["derived"]
    ]  # fmt: skip
    return finish(
        Result(
            benchmark="kernels",
            settings={name: results[name] for name in ("kind", "assumed_devices", "assumed_lanes_per_clock")},
            measures=measures,
            rows=[*({"kind": "measured", **row} for row in results["measured"]), *bounds],
            details={
                "rooflines": rooflines(results),
                **{name: results[name] for name in ("environment", "static", "derived", "measured")},
            },
        )
    )
