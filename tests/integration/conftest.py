"""One gateway for the tests that change nothing of it; those that do make their own."""

from __future__ import annotations

import httpx
import pytest

from benchmarks.gateway.kit import GatewayKit, make_kit, wait_until
from tests.integration.kms_contract import require
from tests.integration.postgres import Postgres
from tests.integration.redis_server import RedisServer


@pytest.fixture(scope="session")
def gateway(tmp_path_factory):
    with make_kit(tmp_path_factory.mktemp("gw")) as kit:
        yield kit


@pytest.fixture(scope="session")
def key(gateway):
    """A developer's key."""
    return gateway.working_key(groups={"developers"})


@pytest.fixture(scope="session")
def admin_key(gateway):
    """A key of somebody who may render prompts and read metrics."""
    return gateway.working_key(groups={"developers", "operators", "security", "auditors"}, subject="admin")


@pytest.fixture(scope="session")
def visitor_key(gateway):
    """A valid key of somebody whom no policy permits anything."""
    text = gateway.new_key(groups={"visitors"}, subject="visitor")
    headers = {"authorization": f"Bearer {text}"}
    wait_until(lambda: httpx.get(gateway.base + "/v1/models", headers=headers).status_code == 200, pause_s=0.3)
    return text


@pytest.fixture
def make_gateway(tmp_path):
    """A factory of gateways of one's own."""
    kits: list[GatewayKit] = []

    def make(**overrides):
        kit = make_kit(tmp_path / f"gw{len(kits)}", **overrides)
        kits.append(kit)
        return kit

    yield make
    for kit in kits:
        kit.stop()


@pytest.fixture(scope="session")
def postgres():
    """One server for all tests; each makes a database of its own in it."""
    server = Postgres()
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """The address of an empty store: in SQLite, then in PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.db'}"
    server = request.getfixturevalue("postgres")
    return server.url(server.new_database())


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory):
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def softhsm(tmp_path_factory):
    """The folder of SoftHSM's tokens and configuration; it reads that once a process, so it is one for all tests."""
    require("softhsm2-util", "apt-get install -y softhsm2")
    folder = tmp_path_factory.mktemp("softhsm")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder / 'tokens'}\nlog.level = ERROR\n")
    return folder
