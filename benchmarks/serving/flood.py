"""Another tenant's time to first token while one tenant floods the server: real engine, everything on.

    strongroom bench flood --state FOLDER --max-running 4 --json flood.json

One caller asks alone, one question after the other, first on an idle server, then while `--connections` connections of
another tenant send as fast as they are answered; who is refused sends again after a second. `--max-running` is
`limits.max_running`: how many requests the engine takes at once, of which no tenant alone gets the last quarter.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import uvloop

from benchmarks.intervals import interval, ratio_interval
from benchmarks.result import Measure, Result, finish, write_result
from benchmarks.serving.client import AnswerError, Client, Target
from benchmarks.serving.served import DEFAULT_CONFIG, ROOT, NotServedError, Served
from benchmarks.serving.workloads import functions

if TYPE_CHECKING:
    from collections.abc import Sequence

ROUTE = "chat/completions"
FILL_S = 120.0
"""How long the flood may take to get its first answers."""


def new_key(served: Served, tenant: str) -> str:
    """A developer's key of this tenant."""
    command = [sys.executable, "-m", "server.cli", "keys", "create", "--state", str(served.state), "--json"]
    command += ["--subject", "caller", "--tenant", tenant, "--group", "developers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NotServedError(f"no key was made: {done.stderr.strip()}")
    key: str = json.loads(done.stdout)["key"]
    return key


def question(model: str, number: int, max_tokens: int) -> bytes:
    """A question that nobody asked before."""
    every = functions()
    source = every[number * 7 % len(every)].source[:400]
    text = f"Question {number}. Explain this function:\n```python\n{source}\n```"
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "stream": True}
    return orjson.dumps({**body, "stream_options": {"include_usage": True}})


def say(line: str) -> None:
    """A line of progress."""
    print(f"flood: {line}", file=sys.stderr, flush=True)


async def ask_alone(client: Client, model: str, first: int, asks: int, max_tokens: int) -> list[float]:
    """Times to first token in seconds, one request at a time."""
    found = []
    for number in range(first, first + asks):
        answer = await client.ask(ROUTE, question(model, number, max_tokens), stream=True)
        if not answer.texts_s:
            raise AnswerError("an answer had no text")
        found.append(answer.texts_s[0] - answer.sent_s)
    return found


class Flood:
    """So many connections of one tenant that never stop sending."""

    def __init__(self, client: Client, model: str, connections: int, max_tokens: int) -> None:
        self.num_answered = 0
        self.num_refused = 0
        self._client, self._model, self._max_tokens = client, model, max_tokens
        self._next = 10_000
        self._tasks = [asyncio.create_task(self._send()) for _ in range(connections)]

    async def _send(self) -> None:
        while True:
            self._next += 1
            try:
                await self._client.ask(ROUTE, question(self._model, self._next, self._max_tokens), stream=True)
                self.num_answered += 1
            except AnswerError:
                self.num_refused += 1
                await asyncio.sleep(1)

    async def fill(self) -> None:
        """Return once the first are answered: the engine is then full.

        Raises:
            NotServedError: Nobody is.
        """
        end_s = time.monotonic() + FILL_S
        while self.num_answered < 1:
            if time.monotonic() > end_s:
                raise NotServedError(f"the flood got no answer within {FILL_S:g} s")
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """End every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def measure(
    served: Served, keys: Sequence[str], connections: int, asks: int, max_tokens: int
) -> tuple[list[float], list[float], Flood]:
    """The calm tenant's times to first token, idle and under the flood."""
    model, url = served.client["MODEL"], served.client["OPENAI_BASE_URL"]
    calm, loud = (Client(Target.parse(url, key=key), timeout_s=300) for key in keys)
    try:
        await ask_alone(calm, model, 0, 2, max_tokens)  # the template is in the calm tenant's prefix cache from here on
        say(f"the server is up; {asks} requests while it is idle")
        idle = await ask_alone(calm, model, 100, asks, max_tokens)
        median_ms = statistics.median(idle) * 1000
        say(f"idle: {median_ms:.0f} ms at the median; now {connections} connections of another tenant")
        flood = Flood(loud, model, connections, max_tokens)
        try:
            await flood.fill()
            say("the flood is served; the same requests again")
            flooded = await ask_alone(calm, model, 200, asks, max_tokens)
        finally:
            await flood.stop()
    finally:
        calm.close()
        loud.close()
    return idle, flooded, flood


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="strongroom bench flood", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    parser.add_argument("--state", type=Path, help="kept between runs: the sealed model stays (default: a new one)")
    parser.add_argument("--max-running", type=int, default=4)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--asks", type=int, default=15, help="requests of the calm tenant, each time")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    if min(args.max_running, args.connections, args.max_tokens) < 1 or args.asks < 3:
        parser.error("--asks must be at least 3, the other numbers at least 1")
    functions()  # parsed before the engine starts
    try:
        with (
            tempfile.TemporaryDirectory(prefix="sr-flood-") as scratch,
            Served(
                args.state or Path(scratch) / "state", args.config, limits={"max_running": args.max_running}
            ) as served,
        ):
            keys = [new_key(served, tenant) for tenant in ("calm", "loud")]
            time.sleep(6)  # every replica hears of a key within five seconds
            idle, flooded, flood = uvloop.run(measure(served, keys, args.connections, args.asks, args.max_tokens))
    except (NotServedError, AnswerError) as err:
        print(f"flood: {err}", file=sys.stderr)
        return 2
    rows, measures = [], []
    for situation, values in (("idle", idle), ("flooded", flooded)):
        times_ms = [value * 1000 for value in values]
        median = statistics.median(times_ms)
        rows.append({"server": situation, "ttft_p50_ms": round(median, 1), "ttft_max_ms": round(max(times_ms), 1)})
        bounds = interval(times_ms, "p50")
        measures.append(Measure("ttft", "ms", "lower", "p50", median, bounds, {"server": situation}, times_ms))
    ratio = statistics.median(flooded) / statistics.median(idle)
    measures.append(Measure("ttft_ratio", "1", "lower", "p50", ratio, ratio_interval(idle, flooded, "p50")))
    rows[1] |= {"ratio": round(ratio, 2), "flood_answered": flood.num_answered, "flood_refused": flood.num_refused}
    for row in rows:
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    if args.json:
        names = ("max_running", "connections", "asks", "max_tokens")
        settings = {name: getattr(args, name) for name in names} | {"config": args.config.name}
        write_result(finish(Result("flood", settings, measures, rows)), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
