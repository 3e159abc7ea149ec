"""What the gateway adds, everything on: requests and streamed tokens a second, added latency, beside the bare engine.

    python -m benchmarks.gateway.overhead [--seconds 5] [--json FILE] [--state DIR]

The engine answers at once. The gateway has one core of its own; load generator, engine and audit writer share another.
The state lies on the disk of `--state`: the audit log's two fdatasyncs a request are part of what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from benchmarks.gateway.kit import MODEL, make_kit
from benchmarks.gateway.load import closed_loop, http_request
from benchmarks.sealed.picture import bars
from server.engine.local import engine_paths

PROSE = "Please explain how a hash map works and when a tree is better."
CODE_ANSWER = (
    "Here it is:\n```python\n"
    + "".join(f"def step_{i}(value):\n    return value * {i} + 1\n\n" for i in range(13))
    + "```\n"
)


def fdatasync_ms(folder: Path, *, rounds: int = 200) -> float:
    """The median of one fdatasync of 500 appended bytes, in milliseconds."""
    path = folder / "fdatasync.probe"
    times = []
    with path.open("ab", buffering=0) as file:
        for _ in range(rounds):
            started_s = time.perf_counter()
            file.write(b"x" * 500)
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - started_s)
    path.unlink()
    return statistics.median(times) * 1000


def body(*, stream: bool) -> bytes:
    return json.dumps(
        {"model": MODEL, "stream": stream, "max_tokens": 64, "messages": [{"role": "user", "content": PROSE}]}
    ).encode()


async def measure(kit, key: str, seconds: float) -> dict:
    gateway = ("127.0.0.1", kit.settings.public.port)
    engine = str(engine_paths(kit.settings.state, MODEL).socket)
    direct_body = json.dumps(
        {
            "model": MODEL,
            "stream": True,
            "messages": [],
            "max_completion_tokens": 64,
            "kv_transfer_params": {"prompt_token_ids": [1, 2, 3]},
            "stream_options": {"include_usage": True},
        }
    ).encode()
    rows = []
    syncs = []
    for stream in (False, True):
        for connections in (1, 16, 64):
            kit.control(num_tokens=64)
            request = http_request("/v1/chat/completions", body(stream=stream), key=key)
            direct_request = http_request("/v1/chat/completions", direct_body)
            await closed_loop(gateway, request, connections=connections, seconds=min(1.0, seconds))  # warm-up
            syncs.append(fdatasync_ms(kit.state))
            direct = await closed_loop(engine, direct_request, connections=connections, seconds=seconds / 2)
            through = await closed_loop(gateway, request, connections=connections, seconds=seconds)
            rows.append(
                {
                    "answer": "64 tokens of prose",
                    "stream": stream,
                    "connections": connections,
                    "requests_per_s": round(through.rate, 1),
                    "events_per_s": round(through.event_rate, 1),
                    "errors": through.num_errors,
                    "p50_ms": round(through.percentile_ms(50), 3),
                    "p99_ms": round(through.percentile_ms(99), 3),
                    "added_p50_ms": round(through.percentile_ms(50) - direct.percentile_ms(50), 3),
                    "added_p99_ms": round(through.percentile_ms(99) - direct.percentile_ms(99), 3),
                    "engine_alone_per_s": round(direct.rate, 1),
                    "fdatasync_ms": round(syncs[-1], 3),
                }
            )
            show(rows[-1])
    kit.control(text=CODE_ANSWER, num_tokens=300)
    request = http_request(
        "/v1/chat/completions", body(stream=True).replace(b'"max_tokens": 64', b'"max_tokens": 400'), key=key
    )
    code = await closed_loop(gateway, request, connections=16, seconds=seconds)
    rows.append(
        {
            "answer": "40 lines of Python",
            "stream": True,
            "connections": 16,
            "requests_per_s": round(code.rate, 1),
            "events_per_s": round(code.event_rate, 1),
            "errors": code.num_errors,
            "p50_ms": round(code.percentile_ms(50), 3),
            "p99_ms": round(code.percentile_ms(99), 3),
        }
    )
    show(rows[-1])
    return {"rows": rows, "fdatasync_median_ms": round(statistics.median(syncs), 3)}


def picture(rows: list[dict]) -> str:
    """Bars of requests a second; the engine alone is the limit of the same run."""
    shown = {}
    for row in rows:
        kind = "streamed" if row["stream"] else "plain"
        shown[f"{row['answer']}, {kind}, {row['connections']} connections"] = [row["requests_per_s"]] * 3
    return bars("Gateway, everything on, one core: requests a second", shown)


def show(row: dict) -> None:
    print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)


def pin(kit) -> dict:
    """Give the gateway the first core and everything else the last; one core machines share it."""
    cores = sorted(os.sched_getaffinity(0))
    layout = {"gateway": [cores[0]], "rest": [cores[-1]]}
    for name, process in kit.processes.items():
        mine = layout["gateway"] if name == "gateway" else layout["rest"]
        for pid in [process.pid, *children(process.pid)]:
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), mine)
    os.sched_setaffinity(0, layout["rest"])
    return layout


def children(pid: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return [int(child) for child in listed]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row")
    parser.add_argument("--state", type=Path, help="where the state folder is made; its disk is part of the figures")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--svg", type=Path, help="write a picture here")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="sr-bench-", dir=args.state))
    kit = make_kit(folder / "state")
    try:
        kit.start()
        key = kit.new_key(groups={"developers"})
        kit.wait_for_key(key)
        layout = pin(kit)
        result = uvloop.run(measure(kit, key, args.seconds))
    finally:
        kit.stop()
        shutil.rmtree(folder, ignore_errors=True)
    result |= {
        "benchmark": "gateway",
        "cores": layout,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if args.svg:
        args.svg.write_text(picture(result["rows"]))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
