"""Time to first token with a template and without, against a served endpoint, in interleaved pairs with a warm cache.

Each pair asks one new question of both arms, one directly after the other and in changing order, over connections that
stay open, for a single token. The interval is of the median of the pairs' differences, from order statistics: nothing
is assumed of how times are distributed, and what slows the machine for longer than a pair falls out of the difference.

Run: python benchmarks/template/ttft.py control.env .strongroom/client.env
(docs/evaluation.md says how control.env is made)
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit


@dataclass
class Arm:
    """One key at one endpoint; `template` is what the answer's header says."""

    url: str
    key: str
    model: str
    template: str = ""
    prompt_tokens: list[int] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)
    _connection: http.client.HTTPConnection | None = None

    def first_token_ms(self, prompt: str) -> float:
        """Ask one streamed question for one token; return how long it took to come."""
        address = urlsplit(self.url)
        if self._connection is None:
            self._connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 1,
            "temperature": 0,
        }
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        start = time.perf_counter()
        self._connection.request("POST", f"{address.path}/chat/completions", json.dumps(body), headers)
        response = self._connection.getresponse()
        if response.status != 200:
            raise SystemExit(f"{response.status}: {response.read()[:300]!r}")
        self.template = response.headers.get("x-strongroom-template", "")
        elapsed_ms = math.nan
        while line := response.readline():
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            choices = event.get("choices") or [{}]
            if math.isnan(elapsed_ms) and (choices[0].get("delta") or {}).get("content"):
                elapsed_ms = (time.perf_counter() - start) * 1000
            if usage := event.get("usage"):
                self.prompt_tokens.append(usage["prompt_tokens"])
                self.cached_tokens.append(usage["prompt_tokens_details"]["cached_tokens"])
        return elapsed_ms


def read_arm(path: Path) -> Arm:
    lines = (line.removeprefix("export ").partition("=") for line in path.read_text().splitlines() if "=" in line)
    env = {key.strip(): value.strip() for key, _, value in lines}
    return Arm(env["OPENAI_BASE_URL"], env["OPENAI_API_KEY"], env["MODEL"])


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Return the median with its 95 % interval."""
    ordered = sorted(values)
    rank = max(0, math.floor(len(ordered) / 2 - 0.98 * math.sqrt(len(ordered))) - 1)
    return statistics.median(ordered), ordered[rank], ordered[-1 - rank]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("without", type=Path)
    parser.add_argument("with_", type=Path, metavar="with")
    parser.add_argument("--pairs", type=int, default=200)
    args = parser.parse_args()
    arms = [read_arm(args.without), read_arm(args.with_)]
    for number in range(6):
        for arm in arms:
            arm.first_token_ms(f"Warm up {number}: say hello.")
    for arm in arms:
        arm.prompt_tokens.clear()
        arm.cached_tokens.clear()
    pairs = []
    for number in range(args.pairs):
        order = (0, 1) if number % 2 else (1, 0)
        question = f"Question {number:04}: name one sorting algorithm."
        times = {which: arms[which].first_token_ms(question) for which in order}
        pairs.append((times[0], times[1]))
    without_ms = statistics.median(a for a, _ in pairs)
    middle, low, high = median_interval([b - a for a, b in pairs])
    result = {
        "templates": [arm.template for arm in arms],
        "prompt_tokens": [statistics.median(arm.prompt_tokens) for arm in arms],
        "cached_tokens": [statistics.median(arm.cached_tokens) for arm in arms],
        "pairs": len(pairs),
        "median_without_ms": round(without_ms, 2),
        "median_with_ms": round(statistics.median(b for _, b in pairs), 2),
        "median_difference_ms": round(middle, 2),
        "interval_95_ms": [round(low, 2), round(high, 2)],
        "interval_95_percent": [round(100 * low / without_ms, 2), round(100 * high / without_ms, 2)],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
