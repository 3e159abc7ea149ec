"""A compressed mixed hour over the whole gateway: what clients sent, log, usage, metrics and engines agree exactly."""

import asyncio
import json
import random
import re
from collections import Counter

import httpx

from benchmarks.gateway.kit import EMBEDDER, MODEL, wait_until
from server.audit.verify import Verifier
from server.store.database import Store
from server.store.usage import list_usage

TURNS = [{"role": "user", "content": "write a function"}]
CHAT = ("/v1/chat/completions", {"model": MODEL, "messages": TURNS})
COMPLETED = [
    CHAT,
    ("/v1/chat/completions", {"model": MODEL, "messages": TURNS, "stream": True}),
    ("/v1/chat/completions", {"model": MODEL, "messages": TURNS, "n": 3, "max_tokens": 5}),
    ("/v1/completions", {"model": MODEL, "prompt": "def add("}),
    ("/v1/messages", {"model": MODEL, "messages": TURNS, "max_tokens": 7}),
    ("/v1/responses", {"model": MODEL, "input": "hello"}),
    ("/v1/embeddings", {"model": EMBEDDER, "input": ["one", "two words"]}),
]
REFUSED = {
    "unknown model": (404, {"model": "nobody's", "messages": TURNS}),
    "wrong body": (400, {"model": MODEL, "messages": "x"}),
    "too long": (400, {"model": MODEL, "messages": [{"role": "user", "content": "word " * 9_000}]}),
    "no key": (401, {"model": MODEL, "messages": TURNS}),
    "wrong key": (401, {"model": MODEL, "messages": TURNS}),
    "visitor": (403, {"model": MODEL, "messages": TURNS}),
}
LONG = {"num_tokens": 40, "delay_ms": 30}


class Hour:
    """Sends, and counts by what a client sees."""

    def __init__(self, kit, keys):
        self.kit = kit
        self.keys = keys
        self.statuses: Counter[int] = Counter()
        self.ids: set[str] = set()
        self.client = httpx.AsyncClient(base_url=kit.base, timeout=60, limits=httpx.Limits(max_connections=24))

    async def send(self, path, body, who="developer"):
        key = self.keys.get(who)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        response = await self.client.post(path, json=body, headers=headers)
        self.statuses[response.status_code] += 1
        self.ids.add(response.headers["x-request-id"])
        return response

    async def refuse(self, name):
        status, body = REFUSED[name]
        response = await self.send("/v1/chat/completions", body, who=name if name in self.keys else "developer")
        assert response.status_code == status, (name, response.text)

    async def leave(self, num_events):
        """Read some events of a stream that goes on for longer, and go away."""
        path, body = CHAT
        headers = {"authorization": f"Bearer {self.keys['developer']}"}
        async with self.client.stream("POST", path, json={**body, "stream": True}, headers=headers) as response:
            self.statuses[response.status_code] += 1
            self.ids.add(response.headers["x-request-id"])
            async for line in response.aiter_lines():
                num_events -= line.startswith("data: ")
                if num_events < 0:
                    return

    async def fail(self, *, stream):
        path, body = CHAT
        response = await self.send(path, {**body, "stream": stream})
        assert response.status_code == 502 or (stream and '"code":"engine_error"' in response.text)


def engine_tokens(kit):
    return {model: kit.stats(model)["tokens"] for model in (MODEL, EMBEDDER)}


def requests_of(kit):
    entries = [entry for entry in kit.entries() if entry.get("route", "").startswith("/v1/")]
    return {
        "accepted": {e["request_id"]: e for e in entries if e["event"] == "gateway:request:accepted"},
        "finished": {e["request_id"]: e for e in entries if e["event"] == "gateway:request:finished"},
        "refused": {
            e["request_id"]: e
            for e in entries
            if e["event"] in ("gateway:request:refused", "gateway:credential:refused") and e["route"] != "/v1/models"
        },
    }


def completion(entries):
    return sum(entry["usage"]["completion"] for entry in entries)


def metric(text, name, **labels):
    """The sum of a counter over the series that have these labels."""
    total = 0.0
    for line in text.splitlines():
        match = re.fullmatch(rf"{name}\{{(.*)\}} (\S+)", line)
        if match and all(f'{key}="{value}"' in match[1] for key, value in labels.items()):
            total += float(match[2])
    return int(total)


async def mixed_hour(hour, ends, rng):
    async with hour.client:
        await send_all(hour, ends, rng)


async def send_all(hour, ends, rng):
    kit = hour.kit
    kit.control(num_tokens=16)
    before = engine_tokens(kit)
    jobs = [hour.send(*rng.choice(COMPLETED)) for _ in range(ends["completed"])]
    jobs += [hour.refuse(rng.choice(list(REFUSED))) for _ in range(ends["refused"])]
    rng.shuffle(jobs)
    await asyncio.gather(*jobs)
    found = requests_of(kit)
    for model, tokens in engine_tokens(kit).items():
        finished = [e for e in found["finished"].values() if e["model"] == model]
        assert completion(finished) == tokens - before[model]  # nobody left early: to the token
    kit.control(**LONG)
    await asyncio.gather(*(hour.leave(rng.randrange(1, 12)) for _ in range(ends["aborted"])))
    wait_until(lambda: kit.stats()["aborted"] == ends["aborted"])
    finished = kit.stats()["finished"]
    kit.control(num_tokens=20, error_after=5)
    await asyncio.gather(*(hour.fail(stream=True) for _ in range(ends["failed"] // 2)))
    assert kit.stats()["finished"] == finished + ends["failed"] // 2
    kit.control(status=500)
    await asyncio.gather(*(hour.fail(stream=False) for _ in range(ends["failed"] // 2)))


def test_clients_log_usage_metrics_and_engines_reconcile(make_gateway):
    kit = make_gateway()
    kit.start()
    keys = {
        "developer": kit.new_key(groups={"developers"}),
        "visitor": kit.new_key(groups={"visitors"}, subject="visitor"),
        "operator": kit.new_key(groups={"operators"}, subject="operator"),
        "wrong key": "sr_0000000000000000_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        "no key": "",
    }
    for who in ("developer", "visitor"):
        kit.wait_for_key(keys[who])
    ends = {"completed": 240, "refused": 120, "aborted": 30, "failed": 30}
    hour = Hour(kit, keys)
    self_test = engine_tokens(kit)[MODEL]
    asyncio.run(mixed_hour(hour, ends, random.Random(8)))  # noqa: S311 - a seeded campaign
    sent = sum(ends.values())
    assert hour.statuses.total() == len(hour.ids) == sent
    found = {}

    def settled():
        found.update(requests_of(kit))
        return len(found["finished"]) + len(found["refused"]) == sent

    wait_until(settled)
    # Clients and log: the same requests, each with one end.
    assert set(found["finished"]) | set(found["refused"]) == hour.ids
    assert set(found["accepted"]) == set(found["finished"])
    outcomes = Counter(entry["outcome"] for entry in found["finished"].values())
    assert outcomes == {end: ends[end] for end in ("completed", "aborted", "failed")}
    assert len(found["refused"]) == ends["refused"] == sum(hour.statuses[status] for status in (400, 401, 403, 404))
    # Log and metrics.
    headers = {"authorization": f"Bearer {keys['operator']}"}
    text = httpx.get(kit.admin + "/metrics", headers=headers).text
    for end, count in {**outcomes, "denied": ends["refused"]}.items():
        assert metric(text, "strongroom_requests_total", outcome=end) == count, end
    usage = [entry["usage"] for entry in found["finished"].values()]
    total = {kind: sum(one[kind] for one in usage) for kind in ("prompt", "completion")}
    for kind, tokens in total.items():
        assert metric(text, "strongroom_tokens_total", kind=kind) == tokens
    assert all(one["prompt"] > 0 for one in usage)
    # Log and engine: a caller who left, or whom an error cut off, is charged for no more than was computed.
    cut_off = [entry for entry in found["finished"].values() if entry["outcome"] != "completed"]
    assert all(completion([entry]) <= LONG["num_tokens"] for entry in cut_off)
    assert all(completion([entry]) > 0 for entry in cut_off if entry["outcome"] == "aborted")
    counted = metric(text, "vllm:generation_tokens_total", model_name=MODEL)
    whole = completion(e for e in found["finished"].values() if e["outcome"] == "completed" and e["model"] == MODEL)
    assert counted == self_test + whole + ends["aborted"] * LONG["num_tokens"] + ends["failed"] // 2 * 20
    # Log and usage totals, by key and model.
    kit.stop()
    store = Store.open(kit.settings.store_url)
    try:
        with store.read() as connection:
            rows = list_usage(connection, from_hour=0, to_hour=1 << 40)
    finally:
        store.close()
    assert sum(spent.requests for _, spent in rows) == len(found["finished"])
    for model in (MODEL, EMBEDDER):
        spent = [spent for key, spent in rows if key.model == model]
        logged = [e["usage"] for e in found["finished"].values() if e["model"] == model]
        assert sum(one.prompt_tokens for one in spent) == sum(one["prompt"] for one in logged)
        assert sum(one.completion_tokens for one in spent) == sum(one["completion"] for one in logged)
    report = Verifier(kit.settings.audit_dir).verify()
    assert (report.num_accepted, report.num_open, report.num_unknown) == (len(found["accepted"]), 0, 0)
    assert json.dumps(REFUSED["too long"][1]) not in text
