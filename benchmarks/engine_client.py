"""CPU cost of speaking to the engine: our client beside aiohttp, interleaved, against the instant engine.

    python -m benchmarks.engine_client --rounds 5

Prints microseconds of CPU (user and system, of this process only) for a streamed request, medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import orjson
import uvloop

from server.engine.client import EngineClient, unix_address
from server.engine.wire import EventParser, build_request
from server.types import Chat, ModelRequest, Prompt, RequestId, TemplateRef, WireFormat

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PROMPT = Prompt(text="", token_ids=list(range(100, 600)), template=TemplateRef("t", "1", "0" * 64))
REQUEST = ModelRequest(
    WireFormat.CHAT, "instant", Chat(messages=({"role": "user", "content": "x"},)), {"temperature": 0.2}, stream=True
)


async def lean(client: EngineClient) -> None:
    """One streamed request by our client."""
    stream = client.stream(PROMPT, REQUEST, max_tokens=64, cache_salt="s" * 43, request_id=RequestId("r"))
    async for _ in stream:
        pass


async def other(session: aiohttp.ClientSession) -> None:
    """The same by aiohttp, with our body and our parser, so that only the transport differs."""
    path, body = build_request(PROMPT, REQUEST, model="instant", max_tokens=64, cache_salt="s" * 43)
    parser = EventParser(chat=True)
    headers = {"content-type": "application/json"}
    async with session.post("http://engine" + path, data=body, headers=headers) as response:
        async for data in response.content.iter_any():
            parser.feed(data)


async def measure(call: Callable[[], Awaitable[None]], num_requests: int, num_parallel: int) -> float:
    """CPU microseconds a request."""

    async def worker() -> None:
        for _ in range(num_requests // num_parallel):
            await call()

    start_s = time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(num_parallel):
            group.create_task(worker())
    return (time.process_time() - start_s) / num_requests * 1e6


async def run(args: argparse.Namespace, socket_path: Path) -> None:
    """Measure all ways, interleaved."""
    client = EngineClient("instant", 4096, unix_address(socket_path))
    await client.wait_ready(10)
    samples: dict[str, list[float]] = {}
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(socket_path), limit=0)) as session:
        for num_tokens, separate in ((1, False), (64, False), (64, True)):
            control = orjson.dumps({"num_tokens": num_tokens, "separate": separate})
            async with session.post("http://engine/control", data=control):
                pass
            how = f"{num_tokens} tokens, {'an event a write' if separate else 'one write'}"
            for _ in range(args.rounds):
                for name, call in (("strongroom", lambda: lean(client)), ("aiohttp", lambda: other(session))):
                    cost_us = await measure(call, args.requests, args.parallel)
                    samples.setdefault(f"{name}, {how}", []).append(cost_us)
    for name, values in samples.items():
        print(f"{name:42} {statistics.median(values):8.1f} us ({min(values):.1f} to {max(values):.1f})")


def main() -> None:
    """Parse the command line, start the instant engine, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=640)
    parser.add_argument("--parallel", type=int, default=16)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        socket_path = Path(folder) / "engine.sock"
        command = [sys.executable, "-m", "benchmarks.instant_engine", "--uds", str(socket_path)]
        engine = subprocess.Popen(command)
        try:
            while not socket_path.exists():
                time.sleep(0.05)
            uvloop.run(run(args, socket_path))
        finally:
            engine.terminate()
            engine.wait()


if __name__ == "__main__":
    main()
