"""From samples to measures. The definitions are those of docs/benchmarks.md, which names the ones of other tools."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.intervals import interval, statistic_of
from benchmarks.result import Measure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.serving.drive import Run, Sample

STATISTICS = ("mean", "p50", "p90", "p99")
MAX_VALUES = 5_000  # of one metric that a result keeps; intervals are made from all
LIMIT_NAMES = ("ttft", "tpot", "e2e")


@dataclass(frozen=True)
class Limits:
    """What a request must keep to count as good, in milliseconds."""

    ttft_ms: float = math.inf
    tpot_ms: float = math.inf
    e2e_ms: float = math.inf

    @classmethod
    def parse(cls, given: Sequence[str]) -> Limits:
        """Read `ttft:500 tpot:50 e2e:10000`.

        Raises:
            ValueError: Another name, or a limit that is not above 0.
        """
        values = {}
        for part in given:
            name, _, limit = part.partition(":")
            try:
                value = float(limit)
            except ValueError:
                value = 0.0
            if name not in LIMIT_NAMES or not value > 0:
                raise ValueError(f"'{part}' is not a limit such as ttft:500; there are {', '.join(LIMIT_NAMES)}, in ms")
            values[f"{name}_ms"] = value
        return cls(**values)

    def are_kept(self, sample: Sample) -> bool:
        """Whether this request counts as good; a failed one never does, nor one that brought no text in time."""
        if sample.error is not None or sample.e2e_s * 1000 > self.e2e_ms:
            return False
        # A plain answer has no first token; its end stands for it.
        ttft_s = sample.ttft_s if sample.ttft_s is not None else sample.e2e_s
        return ttft_s * 1000 <= self.ttft_ms and (sample.tpot_s or 0.0) * 1000 <= self.tpot_ms


def span_s(run: Run) -> float:
    """The seconds that throughput is counted over: from the end of the warm-up to the last event."""
    return max(run.end_s - run.warm_s, 1e-9)


def error_counts(samples: Sequence[Sample]) -> dict[str, int]:
    """How many of each kind failed."""
    return dict(Counter(sample.error for sample in samples if sample.error is not None).most_common())


def _kept(values: Sequence[float]) -> list[float]:
    chosen = values if len(values) <= MAX_VALUES else random.Random(0).sample(list(values), MAX_VALUES)
    return [round(value, 4) for value in chosen]


def latencies(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Milliseconds of each latency, whole answers only."""
    whole = [sample for sample in samples if sample.error is None]
    return {
        "ttft": [s.ttft_s * 1000 for s in whole if s.ttft_s is not None],
        "tpot": [s.tpot_s * 1000 for s in whole if s.tpot_s is not None],
        "itl": [gap * 1000 for s in whole for gap in s.gaps_s],
        "last_text": [s.last_text_s * 1000 for s in whole if s.last_text_s is not None],
        "e2e": [s.e2e_s * 1000 for s in whole],
    }


def measures(run: Run, limits: Limits, labels: Mapping[str, str] | None = None) -> list[Measure]:
    """Everything a run says, after its warm-up."""
    labels = labels or {}
    samples = run.measured
    whole = [sample for sample in samples if sample.error is None]
    found = []
    for name, values in latencies(samples).items():
        if not values:
            continue
        kept = _kept(values)
        for statistic in STATISTICS:
            value, bounds = statistic_of(values, statistic), interval(values, statistic)
            # The single values stand once, beside the median; compare finds them by name.
            behind = kept if statistic == "p50" else None
            found.append(Measure(name, "ms", "lower", statistic, value, bounds, labels, behind))
    seconds = span_s(run)
    good = sum(limits.are_kept(sample) for sample in samples)

    def total(name: str, unit: str, better: str, value: float) -> None:
        found.append(Measure(name, unit, better, "total", value, None, labels))

    # Requests count where they ended, in whole seconds: from these compare makes intervals of a rate.
    by_second = _per_second(run, [(sample.end_s, 1.0) for sample in whole])
    tokens = _per_second(run, [(sample.end_s, float(sample.output_tokens)) for sample in whole])
    for name, unit, counts, sum_ in (
        ("requests", "1/s", by_second, float(len(whole))),
        ("output_tokens", "1/s", tokens, float(sum(sample.output_tokens for sample in whole))),
    ):
        spread = interval(counts, "mean") if len(counts) > 1 else None
        found.append(Measure(name, unit, "higher", "mean", sum_ / seconds, spread, labels, _kept(counts) or None))
    total("goodput", "1/s", "higher", good / seconds)
    total("good_share", "1", "higher", good / len(samples) if samples else math.nan)
    total("error_share", "1", "lower", (len(samples) - len(whole)) / len(samples) if samples else math.nan)
    return found


def _per_second(run: Run, events: Sequence[tuple[float, float]]) -> list[float]:
    """Sums for each whole second from the warm-up to the last due moment, so that draining does not count as slow."""
    num_seconds = int(max(run.last_due_s, run.warm_s) - run.warm_s)
    sums = [0.0] * num_seconds
    for at_s, amount in events:
        slot = int(at_s - run.warm_s)
        if 0 <= slot < num_seconds:
            sums[slot] += amount
    return sums


def row(run: Run, limits: Limits) -> dict[str, float | int | str]:
    """One line for people."""
    samples = run.measured
    values = latencies(samples)
    seconds = span_s(run)
    whole = [sample for sample in samples if sample.error is None]
    late = sorted((sample.sent_s - sample.due_s) * 1000 for sample in samples)
    found: dict[str, float | int | str] = {
        "requests": len(samples),
        "failed": len(samples) - len(whole),
        "requests_per_s": round(len(whole) / seconds, 3),
        "output_tokens_per_s": round(sum(sample.output_tokens for sample in whole) / seconds, 2),
        "good_share": round(sum(limits.are_kept(s) for s in samples) / len(samples), 4) if samples else 0.0,
    }
    for name in ("ttft", "tpot", "itl", "e2e"):
        for statistic in ("p50", "p90", "p99"):
            if values[name]:
                found[f"{name}_{statistic}_ms"] = round(statistic_of(values[name], statistic), 3)
    if late:
        found["sent_late_p99_ms"] = round(statistic_of(late, "p99"), 3)
    return found
