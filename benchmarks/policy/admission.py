"""What admitting a request costs: authentication, decision and limits, with 100,000 keys and 200 policies.

    python -m benchmarks.policy.admission [--keys 100000] [--policies 200] [--requests 20000]

Measured in rounds that take turns, so that a busy machine slows all alike. `bare-route` is a route that reads headers
and body and answers, called as a server calls it; `known-route` and `fresh-route` are the same with admission in front,
`known-added` and `fresh-added` the differences of the medians. `known` asks what was asked before (the policy set
remembers the answer as long as it stands), `fresh` asks a question never asked; without `-route`, admission alone.
`authenticate`, `decide` and `limits` are the parts of `known`. Prints one JSON line a row, microseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from server.api.exchange import read_credentials
from server.auth.api_key import KeyRing, new_key
from server.auth.authenticator import Authenticator
from server.auth.pepper import Pepper
from server.auth.throttle import FailureThrottle
from server.policy.budget import LimitedUse, UsageBook
from server.policy.engine import ModelFacts, PolicyEngine
from server.policy.fairness import Fairness
from server.policy.limit_file import parse_limits
from server.policy.rate import MemoryLedger
from server.store.incidents import Quarantine
from server.store.keys import KeyRow
from server.types import Chat, Client, Credentials, ModelRequest, Outcome, Secret, Usage, WireFormat

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.requests import Request
    from starlette.types import Message, Scope

ROUND = 500
LIMITS = {
    "max_wait_s": 0,
    "prices": {"*": {"prompt": 1, "completion": 2}},
    "limits": [
        {
            "per": per, "requests_per_minute": 10**9, "tokens_per_minute": 10**12, "concurrent": 10**6,
            "tokens_per_day": 10**14, "cost_per_month": 10**9,
        }
        for per in ("key", "subject", "team", "tenant", "model")
    ],
}  # fmt: skip


def write_policies(folder: Path, num_policies: int) -> None:
    """The default set, filled up with a permit for each of many teams."""
    shutil.copytree(Path("configs/policy"), folder, dirs_exist_ok=True)
    num_there = sum(path.read_text().count("@id(") for path in folder.glob("*.cedar"))
    text = "".join(
        f"""@id("team{number}")\n@template("secure-coding")\n@scan_input("annotate")\n@scan_output("annotate")
@max_tokens("2048")\npermit (principal in Group::"team{number}", action == Action::"model:chat:create", resource)
when {{ resource.stage == "live" && context.hour >= 6 && context.network.isInRange(ip("10.0.0.0/8")) }};\n"""
        for number in range(num_policies - num_there)
    )
    (folder / "99-teams.cedar").write_text(text)


class Bench:
    """Everything that admits a request, without sockets."""

    def __init__(self, folder: Path, num_keys: int, num_policies: int) -> None:
        pepper = Pepper({1: bytes(range(32))})
        write_policies(folder, num_policies)
        ring = KeyRing(pepper)
        self.keys: list[str] = []
        rows = []
        for number in range(num_keys):
            drawn = new_key(pepper)
            groups = frozenset({"developers", f"team{number % 150}"})
            rows.append(
                KeyRow(
                    drawn.id, drawn.digest, 1, f"subject{number % 5000}", f"tenant{number % 50}", groups,
                    frozenset({"model:*"}), "", 1.0, "bench",
                )
            )  # fmt: skip
            self.keys.append(drawn.text.reveal())
        ring.load(rows)
        quarantine = Quarantine()
        self.auth = Authenticator(ring, throttle=FailureThrottle(), keyless=FailureThrottle(), quarantine=quarantine)
        self.policy = PolicyEngine.load(folder, models={"house-coder": ModelFacts()}.get, quarantine=quarantine)
        book = parse_limits(LIMITS)
        engines = {"house-coder": Fairness(256)}
        self.limits = LimitedUse(book, ledger=MemoryLedger(book), usage=UsageBook(), engines=engines)
        self.request = ModelRequest(
            WireFormat.CHAT, "house-coder", Chat(({"role": "user", "content": "Write a sort in C. " * 40},)), {}
        )
        self.client = Client("10.1.2.3", "openai/3.54")
        self.next_fresh = 0
        self.app = Starlette(routes=[Route("/v1/chat/completions", self.endpoint, methods=["POST"])])
        self.body = orjson.dumps({"model": "house-coder", "messages": self.request.payload.messages})

    async def route(self, key: str, admit: Callable[[Credentials], Awaitable[None]] | None) -> None:
        """One call of a route, with admission in front or without."""
        scope: Scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
            "headers": [(b"authorization", b"Bearer " + key.encode()), (b"user-agent", b"openai/3.54")],
        }  # fmt: skip
        await self.app(scope | {"admit": admit}, self.receive, self.send)

    async def endpoint(self, request: Request) -> Response:
        """The route: it reads headers and body, and answers."""
        credentials = read_credentials(request.scope)
        body = orjson.loads(await request.body())
        admit = request.scope["admit"]
        if admit is not None:
            await admit(credentials)
        return Response(orjson.dumps({"model": body["model"]}), media_type="application/json")

    async def receive(self) -> Message:
        """The body, whole."""
        return {"type": "http.request", "body": self.body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Where the answer goes."""

    async def bare_route(self, number: int) -> None:
        """The route without admission."""
        await self.route(self.keys[number % 1000], None)

    async def known_route(self, number: int) -> None:
        """The route with admission of a caller who has asked before."""
        await self.route(self.keys[number % 1000], partial(self.admit, client=self.client))

    async def fresh_route(self, number: int) -> None:
        """The route with admission of a caller from an address never seen."""
        key, client = self.new_caller()
        await self.route(key, partial(self.admit, client=client))

    async def admit(self, credentials: Credentials, client: Client) -> None:
        """One request, from credential to settlement."""
        principal = await self.auth.authenticate(credentials, client)
        decision = self.policy.decide(principal, "model:chat:create", self.request, client)
        if not decision.allowed:
            raise SystemExit(f"the benchmark's own request was refused: {decision.reason}")
        async with self.limits.reserve(principal, self.request, prompt_tokens=200, max_tokens=400) as held:
            held.settle(Outcome("completed", usage=Usage(200, 150)))

    async def known(self, number: int) -> None:
        """A caller who has asked before."""
        await self.admit(Credentials((Secret(self.keys[number % 1000]),)), self.client)

    async def fresh(self, number: int) -> None:
        """A caller from an address never seen: nothing of the answer is remembered."""
        key, client = self.new_caller()
        await self.admit(Credentials((Secret(key),)), client)

    def new_caller(self) -> tuple[str, Client]:
        """A key and an address from which nothing was asked."""
        self.next_fresh += 1
        address = f"10.{self.next_fresh >> 16 & 255}.{self.next_fresh >> 8 & 255}.{self.next_fresh & 255}"
        return self.keys[self.next_fresh * 7919 % len(self.keys)], Client(address, "openai/3.54")

    async def authenticate(self, number: int) -> None:
        """The first part of `known`."""
        await self.auth.authenticate(Credentials((Secret(self.keys[number % 1000]),)), self.client)

    async def decide(self, number: int) -> None:
        """The second part of `known`."""
        principal = self.principals[number % 1000]
        self.policy.decide(principal, "model:chat:create", self.request, self.client)

    async def reserve(self, number: int) -> None:
        """The third part of `known`."""
        principal = self.principals[number % 1000]
        async with self.limits.reserve(principal, self.request, prompt_tokens=200, max_tokens=400) as held:
            held.settle(Outcome("completed", usage=Usage(200, 150)))

    async def run(self, num_requests: int) -> dict[str, list[float]]:
        """Return microseconds of each request, by what was measured."""
        self.principals = [
            await self.auth.authenticate(Credentials((Secret(key),)), self.client) for key in self.keys[:1000]
        ]
        for number in range(1000):
            await self.known(number)
        gc.collect()
        gc.freeze()
        measured = {
            "bare-route": self.bare_route, "known-route": self.known_route, "fresh-route": self.fresh_route,
            "known": self.known, "fresh": self.fresh,
            "authenticate": self.authenticate, "decide": self.decide, "limits": self.reserve,
        }  # fmt: skip
        taken: dict[str, list[float]] = defaultdict(list)
        for start in range(0, num_requests, ROUND):
            for name, act in measured.items():
                for number in range(start, start + ROUND):
                    begin_ns = time.perf_counter_ns()
                    await act(number)
                    taken[name].append((time.perf_counter_ns() - begin_ns) / 1000)
        return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=100_000)
    parser.add_argument("--policies", type=int, default=200)
    parser.add_argument("--requests", type=int, default=20_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder) / "policy", args.keys, args.policies)
        taken = asyncio.run(bench.run(args.requests))
    about = {
        "keys": args.keys, "policies": len(bench.policy.current.rules), "python": platform.python_version(),
        "machine": platform.machine(), "cpus": os.cpu_count(),
        "load": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }  # fmt: skip
    medians = {name: statistics.median(values) for name, values in taken.items()}
    for kind in ("known", "fresh"):
        added_us = round(medians[f"{kind}-route"] - medians["bare-route"], 1)
        print(json.dumps({"row": f"{kind}-added", "p50_us": added_us} | about))
    for name, values in taken.items():
        percentiles = statistics.quantiles(values, n=100)
        row = {"row": name, "p50_us": percentiles[49], "p90_us": percentiles[89], "p99_us": percentiles[98]}
        print(
            json.dumps(
                {key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()} | about
            )
        )


if __name__ == "__main__":
    main()
