"""A real Redis for tests of limits."""

import shutil
import subprocess
import time

import pytest
from redis.asyncio import Redis


class RedisServer:
    """A Redis of our own on a unix socket."""

    def __init__(self, folder):
        if shutil.which("redis-server") is None:
            pytest.fail("redis-server is not installed; run: apt-get install redis-server")
        self.socket = folder / "redis.sock"
        self.url = f"unix://{self.socket}"
        self.folder = folder
        self.process = None

    def start(self):
        self.process = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--save", "", "--dir", str(self.folder)],
            stdout=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + 20
        while subprocess.run(["redis-cli", "-s", str(self.socket), "ping"], capture_output=True).stdout != b"PONG\n":
            assert time.monotonic() < deadline_s, "redis-server did not start"
            time.sleep(0.02)

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


async def flush(server):
    async with Redis.from_url(server.url) as redis:
        await redis.flushall()
