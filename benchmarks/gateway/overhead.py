"""What the gateway adds, everything on: requests and streamed tokens a second, added latency, beside the bare engine.

    python -m benchmarks.gateway.overhead [--seconds 5] [--json FILE] [--state DIR] [--litellm PYTHON]

The engine answers at once. The gateway has one core of its own; load generator, engine and audit writer share another.
Beside it, on the gateway's core, a proxy without any control: what it loses of that rate is what the controls cost.
With `--litellm`, the Python of a virtual environment that holds `litellm[proxy]`, LiteLLM's proxy is measured on the
same core in the same run, with a key as its only control.
The state lies on the disk of `--state`: the audit log's two fdatasyncs a request are part of what is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import uvloop

from benchmarks.gateway.kit import MODEL, free_port, standing_kit, wait_until
from benchmarks.gateway.litellm import LiteLLM, start_litellm
from benchmarks.gateway.load import closed_loop, http_request
from benchmarks.result import Measure, Result, finish, write_result
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


def start_bare(kit, core: int) -> tuple[subprocess.Popen[bytes], int]:
    """Start the proxy without controls on the gateway's core; return it and its port."""
    port = free_port()
    engine = str(engine_paths(kit.settings.state, MODEL).socket)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gateway.bare", "--port", str(port), "--engine", engine]
    )
    os.sched_setaffinity(process.pid, [core])

    def listens() -> bool:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True

    wait_until(listens)
    return process, port


async def measure(kit, key: str, bare_port: int, seconds: float, litellm: LiteLLM | None = None) -> dict:
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
            bare = await closed_loop(
                ("127.0.0.1", bare_port), direct_request, connections=connections, seconds=seconds / 2
            )
            through = await closed_loop(gateway, request, connections=connections, seconds=seconds)
            beside = {}
            if litellm is not None:
                there = ("127.0.0.1", litellm.port)
                asked = http_request("/v1/chat/completions", body(stream=stream), key=litellm.key)
                await closed_loop(there, asked, connections=connections, seconds=min(1.0, seconds))
                peer = await closed_loop(there, asked, connections=connections, seconds=seconds)
                beside = {
                    "litellm_per_s": round(peer.rate, 1),
                    "litellm_events_per_s": round(peer.event_rate, 1),
                    "litellm_p50_ms": round(peer.percentile_ms(50), 3),
                    "litellm_errors": peer.num_errors,
                }
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
                    "bare_proxy_per_s": round(bare.rate, 1),
                    "bare_proxy_p50_ms": round(bare.percentile_ms(50), 3),
                    "fdatasync_ms": round(syncs[-1], 3),
                    **beside,
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


def measures_of(rows: list[dict]) -> list[Measure]:
    """What `compare` reads; a run of this benchmark is one value of each."""
    found = []
    for row in rows:
        labels = {"answer": row["answer"], "stream": str(row["stream"]), "connections": str(row["connections"])}
        for name, unit, better in (
            ("requests_per_s", "1/s", "higher"),
            ("events_per_s", "1/s", "higher"),
            ("p50_ms", "ms", "lower"),
            ("p99_ms", "ms", "lower"),
            ("added_p50_ms", "ms", "lower"),
        ):
            if name in row:
                plain = name.removesuffix("_per_s").removesuffix("_ms")
                found.append(Measure(plain, unit, better, "total", row[name], None, labels))
    return found


def details_of(rows: list[dict]) -> dict:
    """Where the time of one request goes, alone on the machine: engine, a proxy as such, the controls."""
    falls = []
    for row in rows:
        if row["connections"] == 1 and "bare_proxy_p50_ms" in row:
            engine = row["p50_ms"] - row["added_p50_ms"]
            proxy = row["bare_proxy_p50_ms"] - engine
            steps = [("engine alone", engine), ("a proxy without controls", proxy)]
            steps.append(("all controls", row["p50_ms"] - row["bare_proxy_p50_ms"]))
            kind = "streamed" if row["stream"] else "plain"
            title = f"One connection, {row['answer']}, {kind}: median of a request"
            named = [{"name": name, "value": round(value, 3)} for name, value in steps]
            falls.append({"title": title, "unit": "ms", "steps": named})
    return {"waterfalls": falls}


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
    parser.add_argument("--litellm", type=Path, help="a Python that has litellm[proxy]: measure it in the same run")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--svg", type=Path, help="write a picture here")
    args = parser.parse_args(argv)
    with standing_kit(args.state) as kit:
        key = kit.working_key(groups={"developers"})
        layout = pin(kit)
        bare, bare_port = start_bare(kit, layout["gateway"][0])
        litellm = None
        try:
            litellm = start_litellm(args.litellm, kit.state.parent, layout) if args.litellm else None
            result = uvloop.run(measure(kit, key, bare_port, args.seconds, litellm))
        finally:
            bare.kill()
            if litellm is not None:
                litellm.stop()
    settings = {"seconds": args.seconds, "cores": layout, "fdatasync_median_ms": result.pop("fdatasync_median_ms")}
    if litellm is not None:
        settings["litellm"] = litellm.version
    result = finish(
        Result("gateway", settings, measures_of(result["rows"]), result["rows"], details_of(result["rows"]))
    )
    if args.svg:
        args.svg.write_text(picture(result.rows))
    if args.json:
        write_result(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
