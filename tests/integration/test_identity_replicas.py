"""Two gateways on one PostgreSQL and one Redis: keys, revocation, quarantine, budgets and tenants are common."""

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import httpx
import pytest
import yaml

from benchmarks.gateway.kit import MODEL, make_kit, wait_until
from server.store.database import Store
from server.store.incidents import Quarantined, lift_incident, open_incident
from server.store.keys import list_keys, revoke_key
from server.store.usage import list_usage

BUDGET = 6_000
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 64}


class Servers:
    """A PostgreSQL and a Redis of our own, on unix sockets; root lends PostgreSQL another user."""

    def __init__(self):
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        if not found or shutil.which("redis-server") is None:
            pytest.fail("servers are missing; run: apt-get install postgresql redis-server")
        self.bin = found[-1]
        self.user = "postgres" if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="sr-rep-"))
        if self.user is not None:
            shutil.chown(self.folder, self.user)
        self.folder.chmod(0o755)
        self.pg("initdb", "-D", str(self.folder / "data"), "-U", "tester", "-A", "trust", "--no-sync")
        options = f"-c listen_addresses='' -c unix_socket_directories={self.folder} -c fsync=off"
        self.pg("pg_ctl", "-D", str(self.folder / "data"), "-o", options, "-l", str(self.folder / "log"), "-w", "start")
        redis_folder = self.folder / "redis"
        redis_folder.mkdir()
        self.redis_socket = redis_folder / "redis.sock"
        self.redis = subprocess.Popen(
            [
                "redis-server",
                "--port",
                "0",
                "--unixsocket",
                str(self.redis_socket),
                "--save",
                "",
                "--dir",
                redis_folder,
            ],
            stdout=subprocess.DEVNULL,
        )
        wait_until(self.redis_socket.exists)
        self.store_url = f"postgresql+psycopg://tester@/postgres?host={self.folder}"
        self.redis_url = f"unix://{self.redis_socket}"

    def pg(self, program, *arguments):
        done = subprocess.run(
            [str(self.bin / program), *arguments], user=self.user, cwd="/", capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr

    def stop(self):
        self.redis.kill()
        self.redis.wait()
        self.pg("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "-w", "stop")
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    limits = folder / "limits.yaml"
    limits.write_text(
        yaml.safe_dump({
            "max_wait_s": 0,
            "limits": [{"per": "tenant", "name": "budgeted", "tokens_per_day": BUDGET}],
        })
    )  # fmt: skip
    servers = Servers()
    patience = {"header_timeout_s": 30.0, "body_timeout_s": 30.0, "write_timeout_s": 30.0}
    kits = [
        make_kit(
            folder / name,
            store={"url": servers.store_url},
            limits={"file": str(limits), "redis_url": servers.redis_url},
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
        servers.stop()


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
    begin_s = time.monotonic()
    wait_until(check, limit_s=5)
    assert time.monotonic() - begin_s < 5


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
