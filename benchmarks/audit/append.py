"""Durable appends: the audit writer against raw fdatasync group commit, interleaved on the same disk.

    python -m benchmarks.audit.append --dir FOLDER_ON_THE_DISK

Two baselines, without socket, hash or signature: `raw` is group commit as a program would write it, 32 threads
that each wait for a committer thread's write and fdatasync; `floor` is the least it can be, 32 tasks of one loop that
writes and syncs between their turns. Prints one JSON line a measurement and a summary.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import uvloop

from server.audit.client import AuditClient
from server.audit.entry import encode_entry, new_entry
from tests.unit.audit.audit_kit import writer_process

ENTRY_BYTES = 432
WRITERS = 32


def sample() -> dict[str, Any]:
    """Return an entry of 432 bytes, the size the reference measurements used."""
    entry = new_entry("admin:act:performed", filler="")
    entry["filler"] = "x" * (ENTRY_BYTES - len(encode_entry(entry)))
    return entry


class ThreadedGroupCommit:
    """Writers that are threads, and one committer."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._has_work = threading.Condition()
        self._queue: list[tuple[bytes, threading.Event]] = []

    def run(self, data: bytes, writers: int, seconds: float) -> tuple[float, list[float]]:
        latencies: list[float] = []
        start_s = time.perf_counter()
        end_s = start_s + seconds

        def write() -> None:
            done = threading.Event()
            while (begin_s := time.perf_counter()) < end_s:
                done.clear()
                with self._has_work:
                    self._queue.append((data, done))
                    self._has_work.notify()
                done.wait()
                latencies.append(time.perf_counter() - begin_s)

        threads = [threading.Thread(target=write) for _ in range(writers)]
        committer = threading.Thread(target=self._commit)
        for thread in (*threads, committer):
            thread.start()
        for thread in threads:
            thread.join()
        elapsed_s = time.perf_counter() - start_s
        with self._has_work:
            self._queue.append((b"", threading.Event()))
            self._has_work.notify()
        committer.join()
        os.close(self._descriptor)
        return len(latencies) / elapsed_s, latencies

    def _commit(self) -> None:
        while True:
            with self._has_work:
                while not self._queue:
                    self._has_work.wait()
                queue, self._queue = self._queue, []
            os.write(self._descriptor, b"".join(data for data, _ in queue))
            os.fdatasync(self._descriptor)
            for data, done in queue:
                done.set()
                if not data:
                    return


class FloorGroupCommit:
    """Write what is queued, fdatasync, resolve."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._queue: list[tuple[bytes, asyncio.Future[int]]] = []
        self._count = 0

    async def append(self, data: bytes) -> int:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        if not self._queue:
            loop.call_soon(self._commit)
        self._queue.append((data, future))
        return await future

    def _commit(self) -> None:
        queue, self._queue = self._queue, []
        os.write(self._descriptor, b"".join(data for data, _ in queue))
        os.fdatasync(self._descriptor)
        for _, future in queue:
            future.set_result(self._count)
            self._count += 1


async def drive(append: Any, payload: Any, writers: int, seconds: float) -> tuple[float, list[float]]:
    """Keep `writers` appends in flight; return appends a second and every latency."""
    latencies: list[float] = []
    end_s = time.perf_counter() + seconds

    async def write() -> None:
        while (start_s := time.perf_counter()) < end_s:
            await append(payload)
            latencies.append(time.perf_counter() - start_s)

    start_s = time.perf_counter()
    await asyncio.gather(*(write() for _ in range(writers)))
    return len(latencies) / (time.perf_counter() - start_s), latencies


async def measure(state: Path, name: str, writers: int, seconds: float) -> dict[str, Any]:
    if name == "raw":
        rate, latencies = ThreadedGroupCommit(state / "raw").run(encode_entry(sample()), writers, seconds)
        cpu_us = 0.0
    elif name == "floor":
        rate, latencies = await drive(
            FloorGroupCommit(state / "floor").append, encode_entry(sample()), writers, seconds
        )
        cpu_us = 0.0
    else:
        client = AuditClient(state / "audit.sock")
        await client.append(sample())
        cpu_s = time.process_time()
        rate, latencies = await drive(client.append, sample(), writers, seconds)
        cpu_us = (time.process_time() - cpu_s) / len(latencies) * 1e6
        await client.aclose()
    latencies.sort()
    return {
        "what": name,
        "writers": writers,
        "per_s": round(rate),
        "p50_ms": round(latencies[len(latencies) // 2] * 1e3, 3),
        "p90_ms": round(latencies[len(latencies) * 9 // 10] * 1e3, 3),
        "p99_ms": round(latencies[len(latencies) * 99 // 100] * 1e3, 3),
        "client_cpu_us": round(cpu_us, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="a folder on the disk to measure")
    parser.add_argument("--writers", type=int, default=WRITERS)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        state = Path(folder)
        with writer_process(state):
            for number in range(args.rounds * 3):
                row = uvloop.run(measure(state, ("raw", "audit", "floor")[number % 3], args.writers, args.seconds))
                rows.append(row)
                print(json.dumps(row), flush=True)
    summary: dict[str, Any] = {"machine": platform.platform(), "cpus": os.cpu_count(), "entry_bytes": ENTRY_BYTES}
    for key in ("per_s", "p50_ms", "p99_ms"):
        medians = {
            what: statistics.median(row[key] for row in rows if row["what"] == what)
            for what in ("raw", "audit", "floor")
        }
        summary[key] = {**medians, "audit_to_raw": round(medians["audit"] / medians["raw"], 3)}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
