"""Attacks on shares (RL-01, RL-02): limits hold before the engine works, and a flood starves nobody else."""

import asyncio
import statistics
import time
from typing import Any

import httpx
import openai
import pytest
import yaml

from benchmarks.gateway.kit import MODEL, make_kit, wait_until
from server.store.database import Store
from server.store.usage import list_usage

BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 16}


def new_kit(folder, limits, **changes):
    folder.mkdir()
    path = folder / "limits.yaml"
    path.write_text(yaml.safe_dump({"limits": limits, "max_wait_s": changes.pop("max_wait_s", 0)}))
    # The kit's own time limits are for tests of slow clients; two hundred clients on a busy machine are slow too.
    patience = {"header_timeout_s": 30.0, "body_timeout_s": 30.0, "write_timeout_s": 30.0}
    return make_kit(folder / "state", limits={"file": str(path), **changes}, public=patience)


LIMITS = [
    {"per": "tenant", "name": "small", "requests_per_minute": 3, "tokens_per_minute": 100_000},
    {"per": "tenant", "name": "daily", "tokens_per_day": 400},
    {"per": "tenant", "name": "single", "concurrent": 1},
]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """Limits that refuse at once."""
    made = new_kit(tmp_path_factory.mktemp("limits") / "kit", LIMITS)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def waiting_kit(tmp_path):
    """No limits, but an engine with few places, and patience."""
    made = new_kit(tmp_path / "kit", [], max_running=16, max_wait_s=30)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def new_key(kit, tenant):
    key = kit.new_key(groups={"developers"}, tenant=tenant)
    kit.wait_for_key(key)
    return key


def post(kit, key, **changes):
    return httpx.post(
        kit.base + "/v1/chat/completions", headers={"authorization": f"Bearer {key}"}, json=BODY | changes, timeout=30
    )


def test_a_spent_limit_is_a_429_with_its_headers_and_no_work_for_the_engine(kit):
    key, other = new_key(kit, "small"), new_key(kit, "other")
    answers = [post(kit, key) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0"]
    assert answers[0].headers["x-ratelimit-limit-requests"] == "3"
    assert answers[0].headers["x-ratelimit-limit-tokens"] == "100000"
    finished = kit.stats()["finished"]
    refused = post(kit, key)
    assert refused.status_code == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert post(kit, key, stream=True).status_code == 429
    assert kit.stats()["finished"] == finished
    assert post(kit, other).status_code == 200
    ids = [answer.headers["x-request-id"] for answer in (answers[0], refused)]
    events = [entry["event"] for entry in kit.entries() if entry.get("request_id") == ids[1]]
    assert events == ["gateway:request:refused"]


def test_tokens_are_counted_and_a_request_that_never_fits_is_not_retried(kit):
    key = new_key(kit, "daily")
    finished = kit.stats()["finished"]
    too_much = post(kit, key, max_tokens=4000)
    assert too_much.status_code == 429
    assert too_much.headers["x-should-retry"] == "false"
    assert too_much.json()["error"]["code"] in ("request_over_limit", "insufficient_quota")
    assert kit.stats()["finished"] == finished


async def test_the_openai_sdk_comes_back_and_is_served(kit):
    key = new_key(kit, "single")
    kit.control(num_tokens=40, delay_ms=30)
    sdk: Any = openai.AsyncOpenAI(base_url=kit.base + "/v1", api_key=key, max_retries=5)
    async with sdk as client:
        stream = await client.chat.completions.create(**(BODY | {"max_tokens": 64}), stream=True)
        await anext(aiter(stream))

        async def drain():
            async for _chunk in stream:
                continue

        draining = asyncio.create_task(drain())
        begin_s = time.monotonic()
        answer = await client.chat.completions.create(**BODY)
        assert answer.choices[0].message.content
        assert time.monotonic() - begin_s >= 1
        await draining
        with_none = client.with_options(max_retries=0)
        stream = await client.chat.completions.create(**(BODY | {"max_tokens": 64}), stream=True)
        await anext(aiter(stream))
        with pytest.raises(openai.RateLimitError):
            await with_none.chat.completions.create(**BODY)
        await stream.close()


async def first_token_s(client, key):
    begin_s = time.perf_counter()
    headers = {"authorization": f"Bearer {key}"}
    async with client.stream("POST", "/v1/chat/completions", headers=headers, json=BODY | {"stream": True}) as answer:
        assert answer.status_code == 200
        async for _line in answer.aiter_lines():
            return time.perf_counter() - begin_s
    raise AssertionError("no token came")


async def test_a_flood_of_one_tenant_leaves_anothers_first_token_within_twice_idle(waiting_kit):
    """200 connections of one tenant against one of another; the engine's own first token takes 300 ms."""
    kit = waiting_kit
    flood_key, calm_key = new_key(kit, "flood"), new_key(kit, "calm")
    kit.control(num_tokens=16, delay_ms=50, first_delay_ms=300, separate=True)
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=kit.base, timeout=60, limits=limits) as flood,
        httpx.AsyncClient(base_url=kit.base, timeout=60) as calm,
    ):
        idle = [await first_token_s(calm, calm_key) for _ in range(7)]
        served = 0

        async def press():
            nonlocal served
            while True:
                answer = await flood.post(
                    "/v1/chat/completions", headers={"authorization": f"Bearer {flood_key}"}, json=BODY
                )
                served += answer.status_code == 200

        pressing = [asyncio.create_task(press()) for _ in range(200)]
        for _ in range(600):
            if (await asyncio.to_thread(kit.stats))["running"] >= 12:  # the flood's whole share of 16
                break
            await asyncio.sleep(0.1)
        else:
            pytest.fail("the flood did not fill its share")
        under = [await first_token_s(calm, calm_key) for _ in range(7)]
        for _ in range(300):
            if served > 12:
                break
            await asyncio.sleep(0.1)
        for task in pressing:
            task.cancel()
        await asyncio.gather(*pressing, return_exceptions=True)
    assert served > 12, "the flood itself is served"
    assert statistics.median(under) <= 2 * statistics.median(idle), (idle, under)


async def test_a_caller_who_leaves_early_pays_for_what_was_computed(kit):
    """LLM10: leaving before the last event is no way around a budget."""
    key = new_key(kit, "leaver")
    kit.control(num_tokens=60, delay_ms=10, separate=True)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=kit.base, timeout=30) as client:
        for _ in range(2):
            body = BODY | {"stream": True, "max_tokens": 64}
            async with client.stream("POST", "/v1/chat/completions", headers=headers, json=body) as answer:
                num_lines = 0
                async for _line in answer.aiter_lines():
                    num_lines += 1
                    if num_lines > 20:
                        break
    await asyncio.sleep(0)

    def spent():
        store = Store.open(kit.settings.store_url)
        try:
            with store.read() as connection:
                rows = list_usage(connection, from_hour=0, to_hour=10**7, tenant="leaver")
        finally:
            store.close()
        return [(used.requests, used.completion_tokens) for _key, used in rows]

    await asyncio.to_thread(wait_until, lambda: [requests for requests, _tokens in spent()] == [2], limit_s=20)
    assert 10 <= spent()[0][1] < 120
