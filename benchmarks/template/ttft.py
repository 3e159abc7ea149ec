"""Time to first token with a template and without, against a served endpoint, in interleaved pairs with a warm cache.

Run: python benchmarks/template/ttft.py control.env .strongroom/client.env --pairs 20
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import statistics
import time
from pathlib import Path
from urllib.parse import urlsplit


def read_env(path: Path) -> dict[str, str]:
    pairs = (line.partition("=") for line in path.read_text().splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def first_token_s(env: dict[str, str], prompt: str) -> tuple[float, str]:
    """Ask one streamed question; return the seconds to the first piece of the answer, and the template's name."""
    address = urlsplit(env["OPENAI_BASE_URL"])
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
    body = {
        "model": env["MODEL"],
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "max_tokens": 4,
        "temperature": 0,
    }
    headers = {"Authorization": f"Bearer {env['OPENAI_API_KEY']}", "Content-Type": "application/json"}
    connection.connect()
    start = time.perf_counter()
    connection.request("POST", f"{address.path}/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(f"{response.status}: {response.read()[:300]!r}")
    seconds = math.nan
    while line := response.readline():
        if math.isnan(seconds) and line.startswith(b"data: {"):
            choices = json.loads(line[6:]).get("choices") or [{}]
            if (choices[0].get("delta") or {}).get("content"):
                seconds = time.perf_counter() - start
    connection.close()
    return seconds, response.headers.get("x-strongroom-template", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("without", type=Path)
    parser.add_argument("with_", type=Path, metavar="with")
    parser.add_argument("--pairs", type=int, default=20)
    args = parser.parse_args()
    envs = [read_env(args.without), read_env(args.with_)]
    names = [first_token_s(env, f"Warm up {n}: say hello.")[1] for n in range(3) for env in envs][-2:]
    pairs = []
    for number in range(args.pairs):
        # The order within a pair changes, so that neither arm always comes second.
        order = (0, 1) if number % 2 else (1, 0)
        times = {
            which: first_token_s(envs[which], f"Question {number}: name one sorting algorithm.")[0] for which in order
        }
        pairs.append((times[0] * 1000, times[1] * 1000))
    differences = sorted(b - a for a, b in pairs)
    # Order statistics give an interval of the median without asking how times are distributed.
    rank = max(0, math.floor(len(pairs) / 2 - 0.98 * math.sqrt(len(pairs))) - 1)
    print(
        json.dumps(
            {
                "templates": names,
                "pairs": len(pairs),
                "median_without_ms": round(statistics.median(a for a, _ in pairs), 2),
                "median_with_ms": round(statistics.median(b for _, b in pairs), 2),
                "median_difference_ms": round(statistics.median(differences), 2),
                "interval_95_ms": [round(differences[rank], 2), round(differences[-1 - rank], 2)],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
