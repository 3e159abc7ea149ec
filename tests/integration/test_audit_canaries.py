"""Canaries through every route and end are nowhere in clear; hostile text leaves whole entries (LG-03, LG-11)."""

import itertools
import json
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.gateway.kit import EMBEDDER, MODEL, ROOT, wait_until
from server.api.public import MODEL_ROUTES
from server.audit.entry import parse_entry
from server.audit.export.files import FileSink
from server.audit.export.ship import Shipper
from server.audit.search import SearchIndex
from server.audit.tail import entries_from
from server.audit.verify import Verifier
from tests.abuse.test_audit_fields import HOSTILE

SECRET = "ghp_" + "c4N4ry" * 6
PROMPT = "canary-prompt-5d1c"
ANSWER = "canary-answer-e07b"
KEY = "sr_canarykey0000_" + "c4N4ryK" * 6 + "x"
CANARIES = (SECRET, PROMPT, ANSWER, KEY)
TEXT = f"{PROMPT} {SECRET}"
TURNS = [{"role": "user", "content": TEXT}]
TOOL = {"type": "function", "function": {"name": "f", "description": TEXT, "parameters": {"type": "object"}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": MODEL, "messages": [{"role": "system", "content": TEXT}, *TURNS], "stop": [PROMPT], "user": PROMPT,
        "tools": [TOOL], "metadata": {"note": TEXT},
    },
    "/v1/completions": {"model": MODEL, "prompt": TEXT, "suffix": TEXT, "user": PROMPT},
    "/v1/responses": {"model": MODEL, "input": TEXT, "instructions": TEXT, "store": True, "metadata": {"k": TEXT}},
    "/v1/messages": {"model": MODEL, "max_tokens": 64, "system": TEXT, "messages": TURNS, "stop_sequences": [PROMPT]},
    "/v1/embeddings": {"model": EMBEDDER, "input": [TEXT], "user": PROMPT},
    "/v1/fim/completions": {"model": MODEL, "prompt": TEXT, "suffix": TEXT},
    "/infill": {"model": MODEL, "input_prefix": TEXT, "input_suffix": TEXT, "input_extra": [{"text": TEXT}]},
    "/v1/messages/count_tokens": {"model": MODEL, "system": TEXT, "messages": TURNS},
    "/tokenize": {"model": MODEL, "prompt": TEXT},
    "/v1/scan": {"text": TEXT, "path": f"/{PROMPT}"},
    "/admin/render": {"model": MODEL, "messages": TURNS, "route": "/v1/chat/completions"},
    "/admin/policy/why": {"reason": TEXT},
    "/admin/keys": {"subject": "s", "secret": TEXT},
    "/admin/incidents": {"note": TEXT},
}  # fmt: skip


def routes_in(folder: Path) -> set[tuple[str, str, bool]]:
    """(method, route, is it the admin listener's), from the code: a new route is tried without being named here."""
    found = {("POST", route, False) for route, _ in MODEL_ROUTES}
    for name, is_admin in (("public.py", False), ("admin.py", True)):
        calls = re.findall(r'add_api_route\(\s*"([^"]+)",[^)]*methods=\["(\w+)"\]', (folder / name).read_text())
        found |= {(method, route, is_admin) for route, method in calls}
    rows = re.findall(r'\("(/[^"]*)", routes\.\w+, "(\w+)"\)', (folder / "admin_identity.py").read_text())
    return found | {(method, f"/admin{route}", True) for route, method in rows}


ROUTES = sorted(routes_in(ROOT / "server" / "api"))


def test_the_routes_are_found():
    assert len(ROUTES) >= 31
    assert {route for _, route, _ in ROUTES} >= set(BODIES)


@pytest.fixture
def kit(make_gateway, tmp_path):
    policy = tmp_path / "policy"
    shutil.copytree(ROOT / "configs/policy", policy)
    file = policy / "10-developers.cedar"
    kept = file.read_text().replace('@id("developers-chat")', '@id("developers-chat")\n@audit_text("yes")', 1)
    file.write_text(kept)
    kit = make_gateway(policy={"directory": str(policy)}, log_level="debug")
    kit.start()
    return kit


def bodies_of(route):
    """The whole body, streamed, with a field too many, with a wrong type, broken JSON, another type of content."""
    body = BODIES.get(route, {"text": TEXT})
    yield {"json": body}
    yield {"json": {**body, "stream": True}}
    yield {"json": {**body, f"x_{PROMPT}": TEXT}}
    yield {"json": {**body, "messages": TEXT, "model": 7, "input": {"a": TEXT}}}
    yield {"content": f'{{"messages": "{TEXT}', "headers": {"content-type": "application/json"}}
    yield {"content": f"<a>{TEXT}</a>", "headers": {"content-type": "text/xml"}}


def send(kit, method, route, is_admin, keys, **options):
    """Send it with every key, and with the canaries where a client can put them besides: query, cookies, headers."""
    path = re.sub(r"\{[^}]+\}", "canary-is-not-here", route)
    for key in keys:
        headers = {"authorization": f"Bearer {key}", "cookie": f"s={SECRET}", "x-title": TEXT, "referer": f"/{PROMPT}"}
        try:
            httpx.request(
                method,
                (kit.admin if is_admin else kit.base) + path,
                params={"q": TEXT, "api_key": SECRET},
                timeout=20,
                **{**options, "headers": headers | options.get("headers", {})},
            )
        except httpx.HTTPError:
            assert is_admin is False  # an answer that the engine's failure broke off


def leave_early(kit, key):
    data = json.dumps({**BODIES["/v1/chat/completions"], "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", kit.settings.public.port)) as sock:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode() + data)
        wait_until(lambda: kit.stats()["running"] == 1)


def test_no_canary_is_in_any_file_or_metric(kit, tmp_path, capfd):
    developer = kit.new_key(groups={"developers"})
    operator = kit.new_key(groups={"developers", "operators", "security", "auditors"}, subject="operator")
    for key in (developer, operator):
        kit.wait_for_key(key)
    kit.control(text=f"{ANSWER}\n" * 4, num_tokens=9)
    for method, route, is_admin in ROUTES:
        for options in bodies_of(route) if method == "POST" else ({},):
            send(kit, method, route, is_admin, (operator if is_admin else developer, KEY), **options)
    completed = [entry for entry in kit.entries() if entry.get("outcome") == "completed"]
    assert {entry["route"] for entry in completed} == {route for route, _ in MODEL_ROUTES}
    for script in ({"error_after": 2}, {"cut_after": 2}, {"status": 500}):
        kit.control(text=f"{ANSWER}\n" * 4, **script)
        for (route, _), stream in itertools.product(MODEL_ROUTES, (False, True)):
            send(kit, "POST", route, False, (developer,), json={**BODIES[route], "stream": stream})
    kit.control(text=f"{ANSWER}\n" * 40, delay_ms=50)
    leave_early(kit, developer)
    wait_until(lambda: kit.stats()["running"] == 0)
    kit.control(text=f"{ANSWER}\n", wrong_ids=True)  # the engine answered another prompt: it is used no more
    send(kit, "POST", "/v1/chat/completions", False, (developer,), json=BODIES["/v1/chat/completions"])
    kit.kill(f"engine-{MODEL}")
    send(kit, "POST", "/v1/chat/completions", False, (developer,), json=BODIES["/v1/chat/completions"])
    kit.kill("writer")
    send(kit, "POST", "/v1/chat/completions", False, (developer,), json=BODIES["/v1/chat/completions"])
    metrics = httpx.get(kit.admin + "/metrics", headers={"authorization": f"Bearer {operator}"}).text
    kit.start_writer()
    kit.stop()
    outcomes = {entry.get("outcome") for entry in kit.entries()}
    assert outcomes >= {"completed", "denied", "failed", "aborted"}
    index = SearchIndex(kit.settings.audit_dir)
    index.update()
    index.close()
    worm = FileSink(tmp_path / "worm", origin=kit.settings.audit.origin)
    Shipper(kit.settings.audit_dir, worm, tmp_path / "cursor.json").run(once=True)
    Verifier(kit.settings.audit_dir).verify()
    assert list((kit.state / "texts").rglob("*.texts")), "texts were kept, encrypted"
    files = [path for folder in (kit.state, tmp_path / "worm") for path in folder.rglob("*") if path.is_file()]
    assert {"gateway.log", "writer.log", "store.db", "checkpoint"} <= {path.name for path in files}
    captured = capfd.readouterr()
    for canary in CANARIES:
        assert canary not in metrics
        assert canary not in captured.out + captured.err
        for path in files:
            assert canary.encode() not in path.read_bytes(), f"{canary[:6]}… is in {path}"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_in_every_field_gives_well_formed_entries(gateway, key, name):
    """Line breaks, escapes, JSON breakers, a megabyte: each request leaves its one or two entries, on one line each."""
    text = HOSTILE[name]
    spoken = text.encode("utf-8", "replace").decode()[:4_000]
    agent = "".join(char for char in spoken if char.isascii() and char.isprintable()).strip()  # all that HTTP lets by
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    bodies = [
        {**chat, "model": text},
        {**chat, "user": spoken, "stop": [spoken[:64]], "metadata": {"k": spoken}},
        {**chat, "messages": [{"role": "user", "name": spoken, "content": spoken}]},
        {**chat, "tools": [{"type": "function", "function": {"name": spoken, "description": text}}]},
        {**chat, spoken[:500]: spoken, "temperature": spoken},
    ]
    for body in bodies:
        response = httpx.post(
            f"{gateway.base}/v1/chat/completions",
            content=json.dumps(body),
            headers={"authorization": f"Bearer {key}", "content-type": "application/json", "user-agent": agent},
            timeout=30,
        )
        wanted = response.headers["x-request-id"].encode()
        entries = [data for _, data in entries_from(gateway.settings.audit_dir, 0) if wanted in data]
        events = [parse_entry(data)["event"].rpartition(":")[2] for data in entries]
        assert events == (["accepted", "finished"] if response.status_code == 200 else ["refused"]), response.text
        for data in entries:
            assert data.decode().isprintable()
            assert len(data) <= 24_576
    Verifier(gateway.settings.audit_dir).verify()
