"""What a request leaves in the gateway's memory: nothing that waits for the cycle collector; real sockets."""

import json
import signal
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from benchmarks.gateway.kit import MODEL, make_kit, wait_until
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


TEXT = {"text": "import os\nos.system(input())\n", "language": "python"}
KEPT = {"model": MODEL, "input": "hi", "store": True}
HI = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
NEW_KEY = {"subject": "bob", "groups": ["developers"], "scopes": ["model:*"]}
LEAK = {"kind": "subject", "target": "z/x"}


class Callers:
    """Clients of both listeners, and what they look for."""

    def __init__(self, kit, stack):
        def client(base, key):
            headers = {"authorization": f"Bearer {key}"}
            return stack.enter_context(httpx.Client(base_url=base, headers=headers, timeout=30))

        self.kit = kit
        self.user = client(kit.base, kit.working_key(groups={"developers"}))
        self.visitor = client(kit.base, kit.working_key(groups={"visitors"}, subject="visitor"))
        self.nobody = client(kit.base, "sr-no-key-of-anybody")
        staff = kit.working_key(groups={"developers", "operators", "security", "auditors"}, subject="staff")
        self.staff = client(kit.admin, staff)
        self.stranger = client(kit.admin, kit.working_key(groups={"developers"}, subject="stranger"))
        self.kept = self.keep()
        self.asked = self.user.post("/v1/chat/completions", json=HI).headers["x-request-id"]

    def keep(self):
        return self.user.post("/v1/responses", json=KEPT).json()["id"]

    def new_key(self):
        return self.staff.post("/admin/keys", json=NEW_KEY).json()["id"]

    def open(self):
        return self.staff.post("/admin/incidents", json=LEAK).json()["id"]


# Every route of both listeners that is not in the table above, each at its end and where it is refused.
OTHERS = {
    "scan": lambda c: c.user.post("/v1/scan", json=TEXT),
    "scan a batch": lambda c: c.user.post("/v1/scan", json={"items": [TEXT, TEXT]}),
    "scan for SARIF": lambda c: c.user.post("/v1/scan", json={**TEXT, "format": "sarif"}),
    "scan without a key": lambda c: c.nobody.post("/v1/scan", json=TEXT),
    "scan without permission": lambda c: c.visitor.post("/v1/scan", json=TEXT),
    "scan of no text": lambda c: c.user.post("/v1/scan", json={"text": 7}),
    "scan of no JSON": lambda c: c.user.post("/v1/scan", content=b"{"),
    "tokenize": lambda c: c.user.post("/tokenize", json={"model": MODEL, "prompt": "hi"}),
    "tokenize a conversation": lambda c: c.user.post("/tokenize", json=HI),
    "tokenize for no model": lambda c: c.user.post("/tokenize", json={"model": "nobody", "prompt": "hi"}),
    "count": lambda c: c.user.post("/v1/messages/count_tokens", json=HI),
    "count without a key": lambda c: c.nobody.post("/v1/messages/count_tokens", json=HI),
    "models": lambda c: c.user.get("/v1/models"),
    "models without a key": lambda c: c.nobody.get("/v1/models"),
    "model": lambda c: c.user.get(f"/v1/models/{MODEL}"),
    "no model": lambda c: c.user.get("/v1/models/nobody"),
    "receipt": lambda c: c.user.get(f"/v1/audit/receipt/{c.asked}"),
    "no receipt": lambda c: c.user.get("/v1/audit/receipt/req_none"),
    "keep": lambda c: c.keep(),
    "keep a stream": lambda c: c.user.post("/v1/responses", json={**KEPT, "stream": True}),
    "go on": lambda c: c.user.post("/v1/responses", json={**KEPT, "previous_response_id": c.kept}),
    "kept": lambda c: c.user.get(f"/v1/responses/{c.kept}"),
    "kept items": lambda c: c.user.get(f"/v1/responses/{c.kept}/input_items"),
    "kept by somebody else": lambda c: c.visitor.get(f"/v1/responses/{c.kept}"),
    "not kept": lambda c: c.user.get("/v1/responses/resp_none"),
    "delete": lambda c: c.user.delete(f"/v1/responses/{c.keep()}"),
    "delete nothing": lambda c: c.user.delete("/v1/responses/resp_none"),
    "livez": lambda c: c.user.get("/livez"),
    "readyz": lambda c: c.user.get("/readyz"),
    "head": lambda c: c.user.head("/"),
    "no route": lambda c: c.user.get("/nowhere"),
    "no method": lambda c: c.user.get("/v1/chat/completions"),
    "metrics": lambda c: c.staff.get("/metrics"),
    "status": lambda c: c.staff.get("/admin/status"),
    "status without permission": lambda c: c.stranger.get("/admin/status"),
    "render": lambda c: c.staff.post("/admin/render", json={"path": "/v1/chat/completions", "body": HI}),
    "render nothing": lambda c: c.staff.post("/admin/render", json={"path": "/nowhere", "body": HI}),
    "keys": lambda c: c.staff.get("/admin/keys"),
    "no key": lambda c: c.staff.get("/admin/keys/none"),
    "policy": lambda c: c.staff.get("/admin/policy"),
    "reload": lambda c: c.staff.post("/admin/policy/reload", json={}),
    "why": lambda c: c.staff.post("/admin/policy/why", json={"action": "model:chat:create"}),
    "usage": lambda c: c.staff.get("/admin/usage"),
    "incidents": lambda c: c.staff.get("/admin/incidents?all=true"),
    "lift nothing": lambda c: c.staff.post("/admin/incidents/99999/lift", json={}),
    "no admin route": lambda c: c.staff.get("/nowhere"),
}
# SQLAlchemy leaves some of its own for each new statement that writes; these are acts of a few people a day.
ACTS = {
    "make a key": lambda c: c.new_key(),
    "show a key": lambda c: c.staff.get(f"/admin/keys/{c.new_key()}"),
    "rotate a key": lambda c: c.staff.post(f"/admin/keys/{c.new_key()}/rotate", json={}),
    "revoke a key": lambda c: c.staff.post(f"/admin/keys/{c.new_key()}/revoke", json={}),
    "open and lift": lambda c: c.staff.post(f"/admin/incidents/{c.open()}/lift", json={}),
}
# How an engine may answer beside well, and what is asked then.
ENGINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tool call": ({"tool_call": {"name": "add", "arguments": {}}}, {"tools": [TOOL]}),
    "error": ({"status": 500}, {}),
    "refusal": ({"status": 400}, {}),
    "error in the answer": ({"error_after": 5}, {}),
    "cut off": ({"cut_after": 5}, {}),
    "findings": ({"text": "```python\nimport os\nos.system(input())\n```\n", "num_tokens": 8}, {}),
}


@pytest.fixture(scope="module")
def callers(counting):
    kit, _ = counting
    kit.control(text="word " * 40, num_tokens=40)
    with ExitStack() as stack:
        yield Callers(kit, stack)


def left_behind(kit, act):
    act()  # what is made once may stay
    cycles(kit)
    for _ in range(NUM):
        act()
    return {name: count for name, count in cycles(kit).items() if count >= NUM // 2}


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_route_leaves_cycles(callers, name):
    assert not left_behind(callers.kit, lambda: OTHERS[name](callers))


@pytest.mark.parametrize("name", ACTS)
def test_an_act_on_the_admin_listener_leaves_none_of_ours(callers, name):
    found = left_behind(callers.kit, lambda: ACTS[name](callers))
    assert not {name: count for name, count in found.items() if not name.startswith("sqlalchemy.")}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_that_fails_leaves_no_cycles(callers, engine, stream):
    script, fields = ENGINES[engine]
    callers.kit.control(**script)
    body = {**HI, **fields, "stream": stream}
    assert not left_behind(callers.kit, lambda: callers.user.post("/v1/chat/completions", json=body))
