"""A closed-loop HTTP load generator for one request; it costs little, for it shares the machine with what it loads."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field


@dataclass
class Load:
    """What one run saw. Latencies in seconds, one an answer."""

    latencies_s: list[float] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    num_events: int = 0
    num_errors: int = 0
    elapsed_s: float = 0.0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies_s) / self.elapsed_s

    @property
    def event_rate(self) -> float:
        """Events with text a second."""
        return self.num_events / self.elapsed_s

    def percentile_ms(self, percent: float) -> float:
        """A percentile of the latencies, in milliseconds."""
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] * 1000


class _Connection(asyncio.Protocol):
    """Sends the same request again and again; an answer ends at its length or at the last chunk."""

    def __init__(self, request: bytes, load: Load, until_s: float, done: asyncio.Future[None], marker: bytes) -> None:
        self._request = request
        self._load = load
        self._until_s = until_s
        self._done = done
        self._marker = marker
        self._data = b""
        self._sent_s = 0.0
        self._saw_first = False

    def connection_made(self, transport):
        self._transport = transport
        self._send()

    def _send(self):
        self._data = b""
        self._saw_first = False
        self._sent_s = time.perf_counter()
        self._transport.write(self._request)

    def data_received(self, data):
        if not self._saw_first:
            self._saw_first = True
            self._load.first_s.append(time.perf_counter() - self._sent_s)
        self._data += data
        head, blank, body = self._data.partition(b"\r\n\r\n")
        if not blank:
            return
        at = head.find(b"content-length: ")
        if at >= 0:
            end = head.find(b"\r\n", at)
            length = int(head[at + 16 : end if end > 0 else None])
            if len(body) < length:
                return
        elif not body.endswith(b"0\r\n\r\n"):
            return
        now_s = time.perf_counter()
        if not head.startswith(b"HTTP/1.1 200"):
            self._load.num_errors += 1
        self._load.latencies_s.append(now_s - self._sent_s)
        self._load.num_events += body.count(self._marker)
        if now_s < self._until_s:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc):
        if not self._done.done():
            self._done.set_result(None)


async def closed_loop(
    address: tuple[str, int] | str, request: bytes, *, connections: int, seconds: float, marker: bytes = b'"content":"'
) -> Load:
    """Keep `connections` requests in flight for `seconds`.

    Args:
        address: Host and port, or the path of a unix socket.
        request: The whole HTTP request.
        connections: How many at a time.
        seconds: For how long.
        marker: What each event with text holds; counted in the answers.
    """
    loop = asyncio.get_running_loop()
    load = Load()
    started_s = time.perf_counter()
    waits = []
    for _ in range(connections):
        done = loop.create_future()
        waits.append(done)

        def factory(done=done):
            return _Connection(request, load, started_s + seconds, done, marker)

        if isinstance(address, str):
            await loop.create_unix_connection(factory, address)
        else:
            await loop.create_connection(factory, *address)
    await asyncio.gather(*waits)
    load.elapsed_s = time.perf_counter() - started_s
    return load


def http_request(path: str, body: bytes, *, key: str = "") -> bytes:
    """A whole POST request."""
    auth = f"authorization: Bearer {key}\r\n" if key else ""
    head = f"POST {path} HTTP/1.1\r\nhost: bench\r\n{auth}content-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
