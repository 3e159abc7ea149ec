"""What an open stream holds: thousands are opened through the gateway, everything on, and left without a token.

    strongroom bench idle --streams 2000 --json idle.json

The engine sends two tokens and then nothing. Memory is the gateway's with its scanners, before and after. While the
streams are open an ordinary request is answered; when they are closed, their descriptors must be gone. Exit code 1
otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
from typing_extensions import override

from benchmarks.gateway.kit import MODEL, GatewayKit, standing_kit
from benchmarks.gateway.process import Held, held_by_tree
from benchmarks.result import Measure, Result, finish, write_result
from benchmarks.serving.client import Client, Target

if TYPE_CHECKING:
    from collections.abc import Sequence

BODY: dict[str, Any] = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "Say hello."}]}
MAX_BYTES_PER_STREAM = 64 * 1024
STREAMS_PER_KEY = 256
SETTLE_S = 2.0


class _Stream(asyncio.Protocol):
    """Sends its request, and tells when the first text of the answer is there."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.data = b""
        self.first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]
        self.transport.write(self._request)

    @override
    def data_received(self, data: bytes) -> None:
        self.data = (self.data + data)[-4096:]
        if not self.first.done() and b'"content":"' in self.data:
            self.first.set_result(None)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if not self.first.done():
            self.first.set_exception(ConnectionError(f"closed before its first text: {self.data[:200]!r}"))


async def hold(kit: GatewayKit, keys: Sequence[str], num_streams: int, hold_s: float) -> dict[str, Any]:
    """Open the streams, look, close them, look again."""
    pid = kit.processes["gateway"].pid
    targets = [Target.parse(f"{kit.base}/v1", key=key) for key in keys]
    body = json.dumps(BODY).encode()
    # A few streams first, so that what is made once is not counted for each.
    await _open(kit, targets, body, 50, close=True)
    await asyncio.sleep(SETTLE_S)
    before = await asyncio.to_thread(held_by_tree, pid)
    streams = await _open(kit, targets, body, num_streams, close=False)
    await asyncio.sleep(hold_s)
    during = await asyncio.to_thread(held_by_tree, pid)
    lost = sum(stream.lost for stream in streams)
    client = Client(targets[0], timeout_s=30)
    started_s = time.perf_counter()
    kit.control(num_tokens=4)
    await client.ask("chat/completions", json.dumps(BODY).encode(), stream=True)
    other_ms = (time.perf_counter() - started_s) * 1000
    client.close()
    for stream in streams:
        stream.transport.abort()
    await asyncio.sleep(SETTLE_S)
    after = await asyncio.to_thread(held_by_tree, pid)
    return {"before": before, "during": during, "after": after, "lost": lost, "other_ms": other_ms}


async def _open(
    kit: GatewayKit, targets: Sequence[Target], body: bytes, num_streams: int, *, close: bool
) -> list[_Stream]:
    loop = asyncio.get_running_loop()
    kit.control(num_tokens=4, hang_after=2, separate=True)
    streams = []
    for start in range(0, num_streams, 50):
        some = []
        for number in range(start, min(start + 50, num_streams)):
            target = targets[number % len(targets)]
            request = target.encode("chat/completions", body)
            _, stream = await loop.create_connection(partial(_Stream, request), target.host, target.port)
            some.append(stream)
        await asyncio.wait_for(asyncio.gather(*(stream.first for stream in some)), 60)
        streams += some
    if close:
        for stream in streams:
            stream.transport.abort()
    return streams


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="strongroom bench idle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--hold", type=float, default=15.0, help="seconds they stay open: more than one heartbeat")
    parser.add_argument("--state", type=Path, help="where the state folder is made")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    if args.streams < 1 or args.hold < 0:
        parser.error("--streams must be at least 1, --hold at least 0")
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most < 3 * args.streams + 200:
        parser.error(f"{args.streams} streams need {3 * args.streams + 200} file descriptors, the limit is {most}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 3 * args.streams + 200), most))
    places = {"max_running": args.streams + 100}
    public = {"heartbeat_s": 10.0, "max_connections": args.streams + 200}
    with standing_kit(args.state, limits=places, public=public) as kit:
        # The default limits let a key have 512 requests at a time, a tenant 2,048.
        count = -(-args.streams // STREAMS_PER_KEY) + 1
        keys = [kit.working_key(groups={"developers"}, tenant=f"t{n % 4}", subject=f"s{n}") for n in range(count)]
        found = uvloop.run(hold(kit, keys, args.streams, args.hold))
    before, during, after = (found[name] for name in ("before", "during", "after"))
    return tell(args, before, during, after, found["lost"], found["other_ms"])


def tell(args: argparse.Namespace, before: Held, during: Held, after: Held, lost: int, other_ms: float) -> int:
    """Write the result, and return the exit code."""
    each = (during.memory_bytes - before.memory_bytes) / args.streams
    row = {
        "streams": args.streams,
        "lost": lost,
        "kib_a_stream": round(each / 1024, 2),
        "before_mib": round(before.memory_bytes / 2**20, 1),
        "during_mib": round(during.memory_bytes / 2**20, 1),
        "after_mib": round(after.memory_bytes / 2**20, 1),
        "fds_before": before.num_fds,
        "fds_during": during.num_fds,
        "fds_after": after.num_fds,
        "other_request_ms": round(other_ms, 2),
    }
    print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    measured = [Measure("memory_a_stream", "bytes", "lower", "total", each)]
    if args.json:
        write_result(finish(Result("idle", {"streams": args.streams, "hold_s": args.hold}, measured, [row])), args.json)
    faults = []
    if lost:
        faults.append(f"{lost} streams were closed by the gateway")
    if each > MAX_BYTES_PER_STREAM:
        faults.append(f"a stream holds {each / 1024:.1f} KiB, at most {MAX_BYTES_PER_STREAM // 1024} were wanted")
    if after.num_fds > before.num_fds + 64:  # idle connections to the engine may stay
        faults.append(f"{after.num_fds - before.num_fds} descriptors are left after the streams were closed")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
