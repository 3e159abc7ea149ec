"""Mixed traffic for half an hour at 70 % of the gateway's limit: do memory, descriptors and the slowest answers stay?

    strongroom bench soak --minutes 30 --json soak.json --html soak.html

Everything is on as in `bench gateway`; the engine answers at once. First the limit is measured with a closed loop, then
requests arrive at random at that share of it. The first sixth of the time is left out. Exit code 1: the gateway or the
audit writer grew, the p99 rose, or requests failed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from benchmarks.gateway.kit import MODEL, GatewayKit, standing_kit
from benchmarks.gateway.process import Held, held_by_tree
from benchmarks.intervals import statistic_of
from benchmarks.report import write_html
from benchmarks.result import Measure, Result, finish, write_result
from benchmarks.serving.client import AnswerError, Client, Target
from benchmarks.serving.drive import closed_loop
from benchmarks.serving.workloads import Options, Request, requests

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MIX = {"edit": 3.0, "review": 2.0, "agent": 4.0, "repo": 1.0}
ANSWER = (
    "The loop reads one entry too many; the last index is `len(rows) - 1`. This holds for an empty list too:\n"
    "```python\n"
    + "".join(f"def step_{n}(rows):\n    return [row * {n} for row in rows]\n\n" for n in range(4))
    + "```\nA test for each branch would have found it.\n"
)
MAX_MODEL_LEN = 32_768  # the kit's own tokenizer makes many tokens of a prompt
NUM_KEYS = 8
NUM_PREPARED = 400
MAX_IN_FLIGHT = 256
MEMORY_MARGIN_BYTES = 24 * 1024 * 1024
MEMORY_MARGIN = 0.05
FD_MARGIN = 16
P99_MARGIN = 1.5


@dataclass
class Window:
    """Some seconds of the soak."""

    start_s: float
    latencies_ms: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    held: dict[str, Held] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """One line of the result."""
        found: dict[str, Any] = {"minute": round(self.start_s / 60, 2), "answers": len(self.latencies_ms)}
        found["failed"] = sum(self.errors.values())
        for name in ("p50", "p99"):
            found[f"{name}_ms"] = round(statistic_of(self.latencies_ms, name), 3) if self.latencies_ms else None
        for process, amount in self.held.items():
            found[f"{process}_mib"] = round(amount.memory_bytes / 2**20, 2)
            found[f"{process}_fds"] = amount.num_fds
        return found


def prepare_requests(seed: int) -> list[Request]:
    """A fixed set that is sent over and over: half of them as streams."""
    streamed, plain = (
        requests(MIX, Options(MODEL, max_tokens=256, max_prompt_chars=4_000, stream=stream), seed=seed)
        for stream in (True, False)
    )
    return [next(streamed if n % 2 else plain) for n in range(NUM_PREPARED)]


async def limit_of(target: Target, prepared: Sequence[Request], seconds: float) -> float:
    """Answers a second of a closed loop."""
    client = Client(target)
    rng = random.Random(0)

    def endless() -> Iterator[Request]:
        while True:
            yield rng.choice(prepared)

    try:
        run = await closed_loop(client, endless(), callers=32, warm_s=seconds / 3, duration_s=seconds)
    finally:
        client.close()
    answered = [sample for sample in run.measured if sample.error is None]
    return len(answered) / max(run.end_s - run.warm_s, 1e-9)


async def soak(
    kit: GatewayKit,
    targets: Sequence[Target],
    prepared: Sequence[Request],
    *,
    rate: float,
    total_s: float,
    window_s: float,
) -> list[Window]:
    """Send for `total_s` and keep a window each `window_s`."""
    clients = [Client(target, timeout_s=60) for target in targets]
    rng = random.Random(1)
    windows = [Window(0.0)]
    running: set[asyncio.Task[None]] = set()
    start_s = time.perf_counter()

    def now() -> float:
        return time.perf_counter() - start_s

    async def one(client: Client, request: Request, due_s: float) -> None:
        try:
            await client.ask(request.route, request.body, stream=request.stream)
        except AnswerError as err:
            windows[-1].errors[str(err)] += 1
        else:
            windows[-1].latencies_ms.append((now() - due_s) * 1000)

    due_s = 0.0
    next_s = window_s
    while due_s < total_s:
        due_s += rng.expovariate(rate)
        wait_s = due_s - now()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        if now() >= next_s:
            windows[-1].held = await asyncio.to_thread(held_by_all, kit)
            show(windows[-1])
            windows.append(Window(next_s))
            next_s += window_s
        if len(running) >= MAX_IN_FLIGHT:
            # Charged to the request: its latency counts from when it was due.
            await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        task = asyncio.create_task(one(rng.choice(clients), rng.choice(prepared), due_s))
        running.add(task)
        task.add_done_callback(running.discard)
    if running:
        await asyncio.wait(running, timeout=60)
    windows[-1].held = await asyncio.to_thread(held_by_all, kit)
    for client in clients:
        client.close()
    return windows


def held_by_all(kit: GatewayKit) -> dict[str, Held]:
    """What gateway (with its scanners) and audit writer hold."""
    return {name: held_by_tree(kit.processes[name].pid) for name in ("gateway", "writer")}


def show(window: Window) -> None:
    """Progress."""
    print("  ".join(f"{name}={value}" for name, value in window.row().items()), flush=True)


def judge(windows: Sequence[Window]) -> list[str]:
    """What did not stay, after the first sixth: thirds are compared, for one window says little on a shared machine."""
    settled = [w for w in windows[max(1, len(windows) // 6) :] if w.held and w.latencies_ms]
    if len(settled) < 6:
        return [f"only {len(settled)} windows after the first minutes; let it run longer"]
    third = len(settled) // 3
    first, last = settled[:third], settled[-third:]
    found = []
    for process in first[0].held:
        before = statistics.median(w.held[process].memory_bytes for w in first)
        after = statistics.median(w.held[process].memory_bytes for w in last)
        if after - before > max(MEMORY_MARGIN_BYTES, MEMORY_MARGIN * before):
            found.append(f"{process}: memory rose from {before / 2**20:.1f} to {after / 2**20:.1f} MiB")
        fds = [max(w.held[process].num_fds for w in part) for part in (first, last)]
        if fds[1] - fds[0] > FD_MARGIN:
            found.append(f"{process}: descriptors rose from {fds[0]} to {fds[1]}")
    slow = [statistics.median(statistic_of(w.latencies_ms, "p99") for w in part) for part in (first, last)]
    if slow[1] > P99_MARGIN * slow[0]:
        found.append(f"the p99 rose from {slow[0]:.1f} to {slow[1]:.1f} ms")
    failed = sum((window.errors for window in windows), Counter())
    if failed:
        found.append(f"requests failed: {dict(failed)}")
    return found


def measures(windows: Sequence[Window]) -> list[Measure]:
    """What the whole run says; the single values are one for each window."""
    settled = [w for w in windows[max(1, len(windows) // 6) :] if w.held and w.latencies_ms]
    found = []
    for name in ("p50", "p99"):
        each = [round(statistic_of(w.latencies_ms, name), 3) for w in settled]
        if each:
            found.append(Measure(f"{name}_of_a_window", "ms", "lower", "p50", statistic_of(each, "p50"), values=each))
    for process in settled[0].held if settled else ():
        memory = [w.held[process].memory_bytes for w in settled]
        found.append(Measure(f"{process}_memory", "bytes", "lower", "p50", statistic_of(memory, "p50"), values=memory))
        fds = [w.held[process].num_fds for w in settled]
        found.append(Measure(f"{process}_fds", "1", "lower", "p50", statistic_of(fds, "p50"), values=fds))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="strongroom bench soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--share", type=float, default=0.7, help="of the limit")
    parser.add_argument("--rate", type=float, help="requests a second, in place of a share of the limit")
    parser.add_argument("--limit-seconds", type=float, default=12.0, help="how long the limit is measured")
    parser.add_argument("--window", type=float, default=30.0, help="seconds of each line of the result")
    parser.add_argument("--state", type=Path, help="where the state folder is made")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--html", type=Path, help="write a report here")
    args = parser.parse_args(argv)
    if min(args.minutes, args.share, args.window, args.limit_seconds) <= 0:
        parser.error("minutes, share, window and limit-seconds must be above 0")
    model = {"id": MODEL, "path": f"models/{MODEL}", "engine": {"max_model_len": MAX_MODEL_LEN}}
    with standing_kit(args.state, models=[model]) as kit:
        keys = [kit.working_key(groups={"developers"}, tenant=f"t{n % 2}", subject=f"s{n}") for n in range(NUM_KEYS)]
        kit.control(text=ANSWER, num_tokens=96)
        targets = [Target.parse(f"{kit.base}/v1", key=key) for key in keys]
        prepared = prepare_requests(0)
        limit = uvloop.run(limit_of(targets[0], prepared, args.limit_seconds))
        rate = args.rate or limit * args.share
        print(f"limit {limit:.1f} requests/s, soaking at {rate:.1f}", flush=True)
        windows = uvloop.run(soak(kit, targets, prepared, rate=rate, total_s=args.minutes * 60, window_s=args.window))
    faults = judge(windows)
    settings = {
        "minutes": args.minutes,
        "share": args.share,
        "window_s": args.window,
        "mix": MIX,
        "cpus": os.cpu_count(),
    }
    details = {"limit_per_s": limit, "rate_per_s": rate, "faults": faults}
    result = finish(Result("soak", settings, measures(windows), [window.row() for window in windows], details))
    if args.json:
        write_result(result, args.json)
    if args.html:
        write_html([result], args.html)
    for fault in faults:
        print(f"not flat: {fault}", file=sys.stderr)
    print("flat" if not faults else "NOT flat", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
