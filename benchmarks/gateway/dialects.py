"""What a streamed answer costs in each wire format: the same 256 tokens of prose, all controls on, beside chat's.

    python -m benchmarks.gateway.dialects [--seconds 2] [--rounds 5] [--json FILE] [--state DIR]

The formats are measured in turn, round after round, so that a slow moment of the machine falls on all of them; a row is
the median of its rounds. The bytes an event carries differ by format, and so does what a client gets for them. What the
gateway itself takes of the processor is told beside the rates, for no neighbour on the machine changes it much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import uvloop

from benchmarks.gateway.kit import MODEL, standing_kit
from benchmarks.gateway.load import closed_loop, http_request
from benchmarks.gateway.overhead import PROSE, pin, show
from benchmarks.gateway.process import cpu_s
from benchmarks.result import Measure, Result, finish, write_result

NUM_TOKENS = 256
CONNECTIONS = 16
TURN = {"messages": [{"role": "user", "content": PROSE}]}
# Each format's request, and what stands in each of its events that has text.
FORMATS = {
    "/v1/chat/completions": ({**TURN, "max_tokens": NUM_TOKENS}, b'"delta":{"content":"'),
    "/v1/completions": ({"prompt": PROSE, "max_tokens": NUM_TOKENS}, b'"text":"'),
    "/v1/responses": ({"input": PROSE, "max_output_tokens": NUM_TOKENS}, b'"type":"response.output_text.delta"'),
    "/v1/messages": ({**TURN, "max_tokens": NUM_TOKENS}, b'"type":"text_delta"'),
}
BASELINE = "/v1/chat/completions"


async def measure(kit, key: str, seconds: float, rounds: int) -> list[dict]:
    """Return a row a format: medians of its rounds, and the rate beside that of chat completions in the same round."""
    address = ("127.0.0.1", kit.settings.public.port)
    kit.control(num_tokens=NUM_TOKENS)
    asked = {
        route: http_request(route, json.dumps({"model": MODEL, "stream": True, **body}).encode(), key=key)
        for route, (body, _) in FORMATS.items()
    }
    found: dict[str, list] = {route: [] for route in FORMATS}
    cpu_ms: dict[str, list[float]] = {route: [] for route in FORMATS}
    gateway = kit.processes["gateway"].pid
    for number in range(rounds + 1):
        for route, (_, marker) in FORMATS.items():
            before_s = cpu_s(gateway)
            load = await closed_loop(
                address, asked[route], connections=CONNECTIONS, seconds=seconds if number else 1.0, marker=marker
            )
            if number:  # the first round warms up
                found[route].append(load)
                cpu_ms[route].append((cpu_s(gateway) - before_s) * 1000 / len(load.latencies_s))
    rows = []
    for route, loads in found.items():
        cpu_beside = [mine / base for mine, base in zip(cpu_ms[route], cpu_ms[BASELINE], strict=True)]
        beside = [load.rate / base.rate for load, base in zip(loads, found[BASELINE], strict=True)]
        rows.append(
            {
                "route": route,
                "connections": CONNECTIONS,
                "requests_per_s": round(statistics.median(load.rate for load in loads), 1),
                "events_per_s": round(statistics.median(load.event_rate for load in loads), 1),
                "events_per_answer": round(loads[0].num_events / len(loads[0].latencies_s), 1),
                "p50_ms": round(statistics.median(load.percentile_ms(50) for load in loads), 3),
                "cpu_ms_per_answer": round(statistics.median(cpu_ms[route]), 3),
                "cpu_beside_chat": round(statistics.median(cpu_beside), 3),
                "beside_chat": round(statistics.median(beside), 3),
                "beside_chat_least": round(min(beside), 3),
                "beside_chat_most": round(max(beside), 3),
                "errors": sum(load.num_errors for load in loads),
            }
        )
        show(rows[-1])
    return rows


def measures_of(rows: list[dict]) -> list[Measure]:
    """What `compare` reads."""
    return [
        Measure(name, unit, better, "total", row[field], None, {"route": row["route"]})
        for row in rows
        for field, name, unit, better in (
            ("requests_per_s", "requests", "1/s", "higher"),
            ("events_per_s", "events", "1/s", "higher"),
            ("p50_ms", "p50", "ms", "lower"),
            ("cpu_ms_per_answer", "cpu", "ms", "lower"),
        )
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each format in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--state", type=Path, help="where the state folder is made; its disk is part of the figures")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    with standing_kit(args.state) as kit:
        key = kit.working_key(groups={"developers"})
        layout = pin(kit)
        rows = uvloop.run(measure(kit, key, args.seconds, args.rounds))
    settings = {"seconds": args.seconds, "rounds": args.rounds, "cores": layout}
    result = finish(Result("dialects", settings, measures_of(rows), rows))
    if args.json:
        write_result(result, args.json)
    return 0 if not any(row["errors"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
