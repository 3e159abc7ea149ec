"""What a request leaves in the gateway's memory: nothing that waits for the cycle collector; real sockets."""

import json
import signal

import httpx
import pytest

from benchmarks.gateway.kit import make_kit, wait_until
from tests.integration.test_wire_contract import BODIES

NUM = 12
STREAMED = sorted(set(BODIES) - {"/v1/embeddings"})


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    kit = make_kit(tmp_path_factory.mktemp("cycles"))
    kit.gateway_program = ("-m", "tests.integration.counting_gateway", str(kit.state / "cycles.json"))
    with kit:
        yield kit, kit.working_key(groups={"developers"})


def cycles(kit):
    found = kit.state / "cycles.json"
    found.unlink(missing_ok=True)
    kit.processes["gateway"].send_signal(signal.SIGUSR1)
    wait_until(found.exists)
    return json.loads(found.read_text())


def ask(client, route, key, **fields):
    return client.post(route, json={**BODIES[route], **fields}, headers={"authorization": f"Bearer {key}"})


def left(client, base, route, key):
    """Leave in the middle of an answer."""
    with httpx.Client(base_url=base) as own:
        body = {**BODIES[route], "stream": True}
        with own.stream("POST", route, json=body, headers={"authorization": f"Bearer {key}"}) as answer:
            next(answer.iter_raw())


WAYS = {
    "plain": lambda client, kit, route, key: ask(client, route, key),
    "streamed": lambda client, kit, route, key: ask(client, route, key, stream=True),
    "bad key": lambda client, kit, route, key: ask(client, route, "sr-no-key-of-anybody"),
    "no such model": lambda client, kit, route, key: ask(client, route, key, model="nobody"),
    "bad field": lambda client, kit, route, key: ask(client, route, key, model=7),
    "left": lambda client, kit, route, key: left(client, kit.base, route, key),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("route", sorted(BODIES))
def test_a_request_leaves_no_cycles(counting, route, way):
    if way in ("streamed", "left") and route not in STREAMED:
        pytest.skip("has no streams")
    kit, key = counting
    kit.control(text="word " * 40, num_tokens=40)
    with httpx.Client(base_url=kit.base) as client:
        WAYS[way](client, kit, route, key)  # what is made once may stay
        cycles(kit)
        for _ in range(NUM):
            WAYS[way](client, kit, route, key)
        found = cycles(kit)
    assert not {name: count for name, count in found.items() if count >= NUM // 2}
