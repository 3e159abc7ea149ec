"""Two gateways on one PostgreSQL and one Redis: keys, revocation, quarantine, budgets and tenants are common."""

import asyncio
import json
import shutil
import time

import httpx
import pytest
import yaml
from redis import Redis

from benchmarks.gateway.kit import MODEL, make_kit, wait_until
from server.store.database import Store
from server.store.incidents import Quarantined, lift_incident, open_incident
from server.store.keys import list_keys, revoke_key
from server.store.usage import list_usage
from tests.integration.postgres import Postgres

BUDGET = 6_000
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 64}


@pytest.fixture(scope="module")
def own_postgres():
    """A server that only these tests use, for they stop it."""
    server = Postgres()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory, own_postgres, redis_server):
    folder = tmp_path_factory.mktemp("replicas")
    limits = folder / "limits.yaml"
    limits.write_text(
        yaml.safe_dump({
            "max_wait_s": 0,
            "limits": [
                {"per": "tenant", "name": name, "tokens_per_day": BUDGET} for name in ("budgeted", "bereft")
            ],
        })
    )  # fmt: skip
    patience = {"header_timeout_s": 30.0, "body_timeout_s": 30.0, "write_timeout_s": 30.0}
    kits = [
        make_kit(
            folder / name,
            store={"url": own_postgres.url("postgres")},
            limits={"file": str(limits), "redis_url": redis_server.url},
            public=patience,
        )
        for name in ("one", "two")
    ]
    for secret in ("pepper", "cache-salt"):
        shutil.copy(kits[0].settings.keys_dir / secret, kits[1].settings.keys_dir / secret)
    try:
        for kit in kits:
            kit.start()
        yield kits
    finally:
        for kit in kits:
            kit.stop()


def status(kit, key):
    return httpx.get(kit.base + "/v1/models", headers={"authorization": f"Bearer {key}"}).status_code


def change(kit, act):
    store = Store.open(kit.settings.store_url)
    try:
        with store.write() as connection:
            return act(connection)
    finally:
        store.close()


def within_five_seconds(check):
    wait_until(check, limit_s=20)  # five are promised; a machine that is busy with tests gets more


def test_a_key_made_at_one_works_at_both_and_its_revocation_too(replicas):
    one, two = replicas
    key = one.new_key(groups={"developers"}, subject="shared")
    for kit in (one, two):
        kit.wait_for_key(key)

    def revoke(connection):
        row = next(row for row in list_keys(connection) if row.subject == "shared")
        revoke_key(connection, row.id, reason="leak", at_s=time.time())

    change(two, revoke)
    within_five_seconds(lambda: status(one, key) == 401 and status(two, key) == 401)


def test_quarantine_of_a_tenant_holds_in_both_and_touches_no_other(replicas):
    one, two = replicas
    bad = one.new_key(groups={"developers"}, tenant="bad")
    good = one.new_key(groups={"developers"}, tenant="good")
    for kit in (one, two):
        kit.wait_for_key(bad)
        kit.wait_for_key(good)
    opened = change(
        one, lambda c: open_incident(c, Quarantined.TENANT, "bad", reason="leak", by="sam", at_s=time.time())
    )
    within_five_seconds(lambda: status(one, bad) == 401 and status(two, bad) == 401)
    assert status(one, good) == status(two, good) == 200
    change(two, lambda c: lift_incident(c, opened.id, by="sam", at_s=time.time()))
    within_five_seconds(lambda: status(one, bad) == 200 and status(two, bad) == 200)


def test_a_replica_that_loses_the_store_ends_what_it_answers(replicas, own_postgres):
    one, _ = replicas
    key = one.working_key(groups={"developers"}, subject="streams")
    one.control(delay_ms=100, num_tokens=2_000)
    body = {"model": MODEL, "stream": True, "max_tokens": 2_000, "messages": [{"role": "user", "content": "hi"}]}
    headers = {"authorization": f"Bearer {key}"}
    lines = []
    try:
        with httpx.stream(
            "POST", one.base + "/v1/chat/completions", json=body, headers=headers, timeout=60
        ) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 4:
                    own_postgres.halt()
        events = [line[6:] for line in lines if line.startswith("data: ")]
        assert json.loads(events[-1])["error"]["code"] == "service_unavailable"
        assert status(one, key) == 503
    finally:
        own_postgres.start()
        one.control()
    one.wait_for_key(key)


async def test_fifty_writers_at_both_spend_no_more_than_the_budget(replicas):
    one, two = replicas
    keys = [one.new_key(groups={"developers"}, tenant="budgeted", subject=f"w{number}") for number in range(5)]
    other = one.new_key(groups={"developers"}, tenant="unlimited")
    for kit in (one, two):
        for key in [*keys, other]:
            kit.wait_for_key(key)
        kit.control(num_tokens=40, delay_ms=1)
    spent = refused = 0
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:

        async def write(number):
            nonlocal spent, refused
            kit, key = replicas[number % 2], keys[number % 5]
            for _ in range(40):
                answer = await client.post(
                    kit.base + "/v1/chat/completions", headers={"authorization": f"Bearer {key}"}, json=BODY
                )
                if answer.status_code == 429:
                    assert int(answer.headers["retry-after"]) >= 1
                    assert answer.json()["error"]["code"] == "insufficient_quota"
                    refused += 1
                    return
                assert answer.status_code == 200, answer.text
                usage = answer.json()["usage"]
                spent += usage["total_tokens"]

        await asyncio.gather(*[write(number) for number in range(50)])
        for kit in (one, two):
            answer = await client.post(
                kit.base + "/v1/chat/completions", headers={"authorization": f"Bearer {other}"}, json=BODY
            )
            assert answer.status_code == 200, "another tenant is unaffected"
    assert refused == 50
    assert 0 < spent <= BUDGET
    assert spent > BUDGET * 0.5

    def counted():
        store = Store.open(one.settings.store_url)
        try:
            with store.read() as connection:
                rows = list_usage(connection, from_hour=0, to_hour=10**7, tenant="budgeted")
        finally:
            store.close()
        return sum(used.prompt_tokens + used.completion_tokens for _key, used in rows)

    wait_until(lambda: counted() == spent, limit_s=20, pause_s=0.2)


async def test_nothing_that_was_spent_is_forgotten_when_a_replica_is_killed(replicas):
    """What callers were given stays counted, what the dead one held counts as spent, and the budget still holds."""
    one, two = replicas
    key = one.new_key(groups={"developers"}, tenant="bereft")
    for kit in (one, two):
        kit.wait_for_key(key)
        kit.control(num_tokens=40, delay_ms=5, separate=True)
    spent = refused = cut = 0
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:

        async def write(kit):
            nonlocal spent, refused, cut
            if kit is one:  # else it may spend the whole budget before the other has answered once
                await killing.wait()
            while True:
                try:
                    answer = await client.post(
                        kit.base + "/v1/chat/completions", headers={"authorization": f"Bearer {key}"}, json=BODY
                    )
                except httpx.HTTPError:
                    assert kit is two, "only the dead one does not answer"
                    cut += 1
                    return
                if answer.status_code == 429:
                    refused += 1
                    return
                assert answer.status_code == 200, answer.text
                spent += answer.json()["usage"]["total_tokens"]
                if kit is two:
                    killing.set()

        killing = asyncio.Event()
        writing = [asyncio.create_task(write(replicas[number % 2])) for number in range(8)]
        await asyncio.wait_for(killing.wait(), timeout=60)
        await asyncio.to_thread(two.kill, "gateway")
        await asyncio.gather(*writing)
    try:
        assert cut > 0
        assert refused > 0
        with Redis.from_url(one.settings.limits.redis_url, decode_responses=True) as redis:
            counted = int(redis.hget("strongroom:limits:tenant:bereft", "td"))
        assert 0 < spent <= counted <= BUDGET
    finally:
        two.start_gateway()
