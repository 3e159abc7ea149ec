"""Streams whose clients leave at random moments: the engine stops, each is on the log, and nothing is left behind."""

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gateway.kit import MODEL, wait_until

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "def f():"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"max_tokens": 3000, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/fim/completions": {"prompt": "def f():", "suffix": "\n"},
    "/infill": {"input_prefix": "def f():", "input_suffix": "\n"},
}
AT_ONCE = 48
MOST_S = 0.4


async def read_to_end(reader):
    while await reader.read(65536):
        pass


async def leave(kit, key, route, after_s, gate):
    """Ask for a stream and close the socket after a while, whatever has come by then."""
    data = json.dumps({"model": MODEL, "stream": True, **BODIES[route]}).encode()
    head = (
        f"POST {route} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n"
    )
    async with gate:
        reader, writer = await asyncio.open_connection("127.0.0.1", kit.settings.public.port)
        writer.write(head.encode() + data)
        await writer.drain()
        ended = asyncio.create_task(read_to_end(reader))
        done, _ = await asyncio.wait([ended], timeout=after_s)
        assert not done  # the streams are long
        ended.cancel()
        writer.close()
        await writer.wait_closed()


async def leave_all(kit, key, count, seed):
    chance = random.Random(seed)  # noqa: S311 - moments, not secrets
    gate = asyncio.Semaphore(AT_ONCE)
    routes = list(BODIES)
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(
                leave(kit, key, routes[number % len(routes)], max(0.0, chance.uniform(-0.1, MOST_S)), gate)
            )


def held(kit):
    """File descriptors and resident MiB of the gateway."""
    folder = Path(f"/proc/{kit.processes['gateway'].pid}")
    pages = int((folder / "statm").read_text().split()[1])
    return len(list((folder / "fd").iterdir())), pages * 4096 / 2**20


def cancel(make_gateway, tmp_path, count):
    limits = tmp_path / "limits.yaml"
    limits.write_text("limits: []\nmax_wait_s: 10\n")
    kit = make_gateway(limits={"file": str(limits), "max_running": 256, "max_completions": 256})
    kit.start()
    key = kit.new_key(groups={"developers"})
    kit.wait_for_key(key)
    kit.control(num_tokens=3000, delay_ms=10, separate=True)
    asyncio.run(leave_all(kit, key, count, seed=1))  # pools and caches fill
    wait_until(lambda: kit.stats()["running"] == 0, limit_s=2)
    wait_until(lambda: sum(outcomes(kit).values()) == count)
    fds, resident = held(kit)
    asyncio.run(leave_all(kit, key, count, seed=2))
    wait_until(lambda: kit.stats()["running"] == 0, limit_s=2)
    wait_until(lambda: sum(outcomes(kit).values()) == 2 * count)
    assert outcomes(kit) == {"aborted": 2 * count}
    fds_after, resident_after = held(kit)
    assert fds_after <= fds + 4  # idle connections to the engine come and go
    assert resident_after <= resident * 1.1 + 4
    opened = [entry["request_id"] for entry in kit.entries() if entry["event"] == "gateway:request:accepted"]
    assert len(opened) > count  # most had reached the engine


def outcomes(kit):
    """How often each outcome stands on the log."""
    last = ("gateway:request:finished", "gateway:request:refused")
    return Counter(entry["outcome"] for entry in kit.entries() if entry["event"] in last)


def test_streams_that_are_left_at_random_moments_leave_nothing_behind(make_gateway, tmp_path):
    cancel(make_gateway, tmp_path, 150)


@pytest.mark.slow
def test_a_thousand_streams_that_are_left_at_random_moments(make_gateway, tmp_path):
    cancel(make_gateway, tmp_path, 1000)
