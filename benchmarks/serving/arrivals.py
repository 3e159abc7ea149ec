"""When requests arrive in an open loop: at moments fixed beforehand, whatever the server does.

poisson   users who know nothing of each other
uniform   evenly spaced
burst:N   N at once, the groups at random; the same mean rate
a file    a recorded trace: JSON Lines with `at_s`, and with `workload` or `route` and `body` where it was recorded
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from benchmarks.serving.workloads import WORKLOADS, Request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_ARRIVALS = 1_000_000
MAX_TRACE_BYTES = 1024 * 1024 * 1024


@dataclass(frozen=True)
class Arrival:
    """A request's moment, in seconds from the start; the request itself where a trace says it."""

    at_s: float
    request: Request | None = None
    workload: str | None = None


def arrivals(kind: str, rate: float, duration_s: float, *, seed: int) -> list[Arrival]:
    """Moments of `poisson`, `uniform` or `burst:N` arrivals at a mean rate.

    Raises:
        ValueError: Another kind, a rate that is not above 0, or more arrivals than `MAX_ARRIVALS`.
    """
    if not 0 < rate < math.inf or not 0 < duration_s < math.inf:
        raise ValueError("rate and duration must be above 0")
    if rate * duration_s > MAX_ARRIVALS:
        raise ValueError(f"{rate} requests a second for {duration_s} s are more than {MAX_ARRIVALS} requests")
    name, _, size = kind.partition(":")
    group = 1
    if name == "burst":
        if not size.isdecimal() or not 1 <= int(size) <= MAX_ARRIVALS:
            raise ValueError("bursts are given as burst:N, N requests at once, such as burst:8")
        group = int(size)
    elif name not in ("poisson", "uniform") or size:
        raise ValueError(f"'{kind}' is not poisson, uniform or burst:N")
    rng = random.Random(seed)
    moments: list[Arrival] = []
    now_s = 0.0
    while True:
        now_s += group / rate if name == "uniform" else rng.expovariate(rate / group)
        if now_s > duration_s:
            return moments
        moments += [Arrival(now_s)] * group


def parse_trace(lines: Iterator[bytes]) -> Iterator[Arrival]:
    """Read a trace.

    Raises:
        ValueError: A line is not what the format says; the message has its number.
    """
    before_s = 0.0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if number > MAX_ARRIVALS:
            raise ValueError(f"line {number}: more than {MAX_ARRIVALS} arrivals")
        try:
            entry = orjson.loads(line)
        except orjson.JSONDecodeError as err:
            raise ValueError(f"line {number}: not JSON") from err
        if not isinstance(entry, dict) or set(entry) - {"at_s", "workload", "route", "body"}:
            raise ValueError(f"line {number}: expected an object with at_s, and workload or route and body")
        at_s = entry.get("at_s")
        if isinstance(at_s, bool) or not isinstance(at_s, (int, float)) or at_s < before_s:
            raise ValueError(f"line {number}: at_s must be a number of seconds, not smaller than on the line before")
        before_s = at_s
        workload = entry.get("workload")
        if workload is not None and workload not in WORKLOADS:
            raise ValueError(f"line {number}: workload must be one of {', '.join(WORKLOADS)}")
        if "body" not in entry:
            yield Arrival(float(at_s), workload=workload)
            continue
        body, route = entry["body"], entry.get("route")
        if not isinstance(body, dict) or route not in ("chat/completions", "completions"):
            raise ValueError(f"line {number}: body must be an object, route chat/completions or completions")
        request = Request(workload or "trace", route, orjson.dumps(body), stream=bool(body.get("stream")))
        yield Arrival(float(at_s), request)


def load_trace(path: Path) -> list[Arrival]:
    """Read a trace's file.

    Raises:
        ValueError: It can't be read, is too large, or is no trace.
    """
    try:
        if path.stat().st_size > MAX_TRACE_BYTES:
            raise ValueError(f"{path}: larger than {MAX_TRACE_BYTES} bytes")
        with path.open("rb") as file:
            found = list(parse_trace(iter(file)))
    except OSError as err:
        raise ValueError(f"{path}: can't be read: {err.strerror}") from err
    if not found:
        raise ValueError(f"{path}: no arrivals in it")
    return found
