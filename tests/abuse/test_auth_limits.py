"""Attacks on shares (RL-01, RL-02): limits hold before the engine works, and a flood starves nobody else."""

import asyncio
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import yaml

from benchmarks.gateway.kit import MODEL, make_kit, wait_until
from server.auth.api_key import parse_key_id
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


# Every route of the public listener that reaches no model, but the list of models.
OTHER_ROUTES: dict[tuple[str, str], dict[str, Any] | None] = {
    ("POST", "/v1/scan"): {"text": "print(1)"},
    ("POST", "/tokenize"): {"model": MODEL, "prompt": "hi"},
    ("POST", "/v1/messages/count_tokens"): {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
    ("GET", "/v1/audit/receipt/req_none"): None,
    ("GET", "/v1/responses/resp_none"): None,
    ("GET", "/v1/responses/resp_none/input_items"): None,
    ("DELETE", "/v1/responses/resp_none"): None,
}
LIMITS = [
    {"per": "tenant", "name": "small", "requests_per_minute": 3, "tokens_per_minute": 100_000},
    {"per": "tenant", "name": "batches", "requests_per_minute": 4},
    {"per": "tenant", "name": "daily", "tokens_per_day": 400},
    {"per": "tenant", "name": "single", "concurrent": 1},
    *[{"per": "tenant", "name": f"only{number}", "requests_per_minute": 1} for number in range(len(OTHER_ROUTES))],
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
    return kit.working_key(groups={"developers"}, tenant=tenant)


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


@pytest.mark.parametrize("number", range(len(OTHER_ROUTES)), ids=[" ".join(route) for route in OTHER_ROUTES])
def test_routes_that_reach_no_model_count_too(kit, number):
    key = new_key(kit, f"only{number}")
    (method, path), body = list(OTHER_ROUTES.items())[number]

    def ask():
        return httpx.request(method, kit.base + path, headers={"authorization": f"Bearer {key}"}, json=body, timeout=30)

    assert ask().status_code in (200, 404)
    refused = ask()
    assert refused.status_code == 429, refused.text
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert kit.entries()[-1]["code"] == "rate_limit_exceeded"
    assert kit.entries()[-1]["event"] == "gateway:request:refused"


def test_each_text_of_a_batch_of_scans_counts(kit):
    key = new_key(kit, "batches")

    def ask(num):
        body = {"items": [{"text": "print(1)", "language": "python"}] * num}
        return httpx.post(kit.base + "/v1/scan", headers={"authorization": f"Bearer {key}"}, json=body, timeout=30)

    never = ask(5)
    assert (never.status_code, never.json()["error"]["code"]) == (429, "request_over_limit")
    assert ask(3).headers["x-ratelimit-remaining-requests"] == "1"
    assert ask(2).status_code == 429
    assert ask(1).status_code == 200


def test_a_batch_of_scans_ends_with_its_key(kit):
    """A batch may run for minutes; who lost the key meanwhile is told nothing more."""
    key, security = new_key(kit, "single"), kit.working_key(groups={"security"})
    headers = {"authorization": f"Bearer {key}"}
    text = "".join(f"def f{n}(x):\n    return g(x)[{n}] + x\n" for n in range(350))
    batch = {"items": [{"text": text + f"# {n}", "language": "python"} for n in range(256)]}
    with ThreadPoolExecutor(1) as pool:
        scan = pool.submit(httpx.post, kit.base + "/v1/scan", headers=headers, json=batch, timeout=300)
        ask = {"model": MODEL, "prompt": "hi"}
        wait_until(  # the one place of the tenant is taken, so the batch runs
            lambda: httpx.post(kit.base + "/tokenize", headers=headers, json=ask, timeout=30).status_code == 429
        )
        revoked = httpx.post(
            f"{kit.admin}/admin/keys/{parse_key_id(key)}/revoke",
            headers={"authorization": f"Bearer {security}"},
            json={},
            timeout=30,
        )
        assert revoked.status_code == 200, revoked.text
        answer = scan.result()
    assert answer.status_code == 401
    last = kit.entries()[-1]
    assert (last["event"], last["route"]) == ("gateway:credential:refused", "/v1/scan")
    assert "while the request was running" in last["reason"]


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


def test_a_changed_limits_file_holds_without_a_restart_and_a_bad_one_changes_nothing(tmp_path):
    kit = new_kit(tmp_path / "kit", [])
    try:
        kit.start()
        key = new_key(kit, "acme")
        assert post(kit, key).status_code == 200
        path = kit.settings.limits.file
        path.write_text(yaml.safe_dump({"limits": [{"per": "tenant", "requests_per_minute": 1}], "max_wait_s": 0}))
        wait_until(lambda: post(kit, key).status_code == 429)
        path.write_text("limits: [")

        def changes():
            return [entry for entry in kit.entries() if entry["event"] == "admin:budget:changed"]

        wait_until(lambda: len(changes()) == 2, pause_s=0.3)
        good, bad = changes()
        assert good["after"] == bad["before"]
        assert bad["refused"]
        assert post(kit, key).status_code == 429
    finally:
        kit.stop()
