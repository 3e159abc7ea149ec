"""Checks of docs/api-audit.md that no other file makes, over raw sockets where a client would tidy up."""

import asyncio
import http.client
import itertools
import json
import secrets
import socket

import httpx
import pytest

from benchmarks.gateway.kit import MODEL, make_kit
from server.api.public import MODEL_ROUTES

CHAT = "/v1/chat/completions"
BODY = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
# What vLLM's own server serves; most of it without its key.
ENGINE_ROUTES = [
    "/invocations", "/pooling", "/classify", "/score", "/rerank", "/detokenize", "/pause", "/resume", "/is_paused",
    "/scale_elastic_ep", "/update_weights", "/init_weight_transfer_engine", "/abort_requests", "/get_world_size",
    "/load", "/version", "/server_info", "/reset_prefix_cache", "/sleep", "/wake_up", "/collective_rpc",
    "/start_profile", "/tokenizer_info", "/metrics", "/docs", "/redoc", "/openapi.json", "/inference/v1/generate",
    "/generative_scoring", "/v1/load_lora_adapter", "/ping", "/v1/rerank", "/v1/score",
]  # fmt: skip
_addresses = (f"127.2.{high}.{low}" for high, low in itertools.product(range(250), range(1, 250)))


def raw(gateway, head, body=b""):
    """Status of what the gateway answers to these bytes, 0 where it closes without an answer."""
    with socket.create_connection(
        ("127.0.0.1", gateway.settings.public.port), 20, source_address=(next(_addresses), 0)
    ) as link:
        link.sendall(head.replace(b"\n", b"\r\n") + b"\r\n" + body)
        answer = link.makefile("rb").readline().split(b" ")
        return int(answer[1]) if len(answer) > 1 else 0


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ENGINE_ROUTES)
def test_no_route_of_the_engine_is_there(gateway, key, method, path):
    """AU-01: with a key and without."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address=next(_addresses)), base_url=gateway.base) as client:
        for headers in ({}, {"authorization": f"Bearer {key}"}):
            answer = client.request(method, path, headers=headers, json={} if method == "POST" else None)
            assert answer.status_code in (401, 404), answer.text
            assert "vllm" not in answer.text.lower()


@pytest.mark.parametrize(
    "lines",
    [
        b"POST /v1/chat/completions HTTP/1.1\nhost: x/livez?\n",
        b"POST /v1/chat/completions HTTP/1.1\nhost: a/#\n",
        b"POST /v1/chat/completions HTTP/1.1\nhost: [::1\n",
        b"POST http://x/livez HTTP/1.1\nhost: x\n",
        b"POST http://x/v1/chat/completions HTTP/1.1\nhost: x\n",
        b"POST @evil/v1/chat/completions HTTP/1.1\nhost: x\n",
        b"POST /livez/../v1/chat/completions HTTP/1.1\nhost: x\n",
        b"POST /v1/chat/completions?x=/livez HTTP/1.1\nhost: x\n",
        b"POST /v1/chat/completions#/livez HTTP/1.1\nhost: x\n",
        b"GET /v1/models HTTP/1.1\nhost: x/livez?\n",
    ],
)
def test_a_forged_host_or_target_opens_nothing(gateway, lines):
    """AU-05: access is decided on the raw path."""
    body = b'{"model": "%s", "messages": []}' % MODEL.encode()
    head = lines + b"content-type: application/json\ncontent-length: %d\n" % len(body)
    assert raw(gateway, head, body) in (0, 400, 401, 404, 405)


@pytest.mark.parametrize("route", [route for route, _ in MODEL_ROUTES])
@pytest.mark.parametrize("method", ["OPTIONS", "HEAD", "TRACE", "PUT", "post", "CONNECT"])
def test_no_other_method_opens_a_route(gateway, key, route, method):
    """AU-06: with a key too, and a header that claims another method changes nothing."""
    head = f"{method} {route} HTTP/1.1\nhost: x\nx-http-method-override: POST\ncontent-length: 0\n"
    for credential in ("", f"authorization: Bearer {key}\n"):
        assert raw(gateway, (head + credential).encode()) in (0, 400, 401, 404, 405)


@pytest.mark.parametrize(
    "path", ["/debug", "/actuator", "/actuator/env", "/.git/HEAD", "/env", "/admin", "/admin/keys"]
)
def test_nothing_of_operators_is_public(gateway, admin_key, path):
    """AZ-05, AZ-09: not even for an admin's key."""
    answer = httpx.get(gateway.base + path, headers={"authorization": f"Bearer {admin_key}"})
    assert answer.status_code == 404


@pytest.mark.parametrize(
    "model",
    ["/etc/passwd", "../../etc/passwd", "https://example.com/model", "org/model", "file:///etc/passwd", "lora-x", " "],
)
def test_a_model_is_a_name_and_no_place(gateway, key, model):
    """AZ-08."""
    answer = httpx.post(gateway.base + CHAT, headers={"authorization": f"Bearer {key}"}, json=BODY | {"model": model})
    assert answer.status_code == 404, answer.text
    assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    "fields", [{"tenant": "b"}, {"role": "admin"}, {"policy": "x"}, {"admin": True}, {"user_id": 1}]
)
def test_fields_that_claim_rights_give_none(gateway, key, fields):
    """AZ-03: who is on record is who the key says."""
    answer = httpx.post(gateway.base + CHAT, headers={"authorization": f"Bearer {key}"}, json=BODY | fields)
    assert answer.status_code in (200, 400)
    found = [e for e in gateway.entries() if e.get("request_id") == answer.headers["x-request-id"]]
    assert found
    assert all(entry.get("tenant", "a") == "a" for entry in found)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A gateway whose engine these tests tell how to answer, and a key of it."""
    patience = {"header_timeout_s": 30.0, "body_timeout_s": 30.0, "write_timeout_s": 30.0}
    kit = make_kit(tmp_path_factory.mktemp("audit") / "kit", public=patience)
    try:
        kit.start()
        key = kit.new_key(groups={"developers"})
        kit.wait_for_key(key)
        yield kit, key
    finally:
        kit.stop()


async def test_every_caller_gets_its_own_answer(own):
    """AZ-07: 200 at once, streamed and not, every fifth leaves early; the engine's answer is a digest of the prompt."""
    kit, key = own
    kit.control(echo=True, separate=True, delay_ms=5)
    limits = httpx.Limits(max_connections=None)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=kit.base, timeout=120, limits=limits, headers=headers) as client:

        def body_of(nonce):
            return BODY | {"messages": [{"role": "user", "content": nonce}], "max_tokens": 64}

        async def ask(nonce):
            answer = await client.post(CHAT, json=body_of(nonce))
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["message"]["content"]

        async def ask_streamed(nonce, leaves):
            text = ""
            async with client.stream("POST", CHAT, json=body_of(nonce) | {"stream": True}) as answer:
                assert answer.status_code == 200
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        choices = json.loads(line[6:])["choices"]
                        text += (choices[0]["delta"].get("content") or "") if choices else ""
                    if leaves and text:
                        return None
            return text

        nonces = [secrets.token_hex(16) for _ in range(20)]
        expected = {nonce: await ask(nonce) for nonce in nonces}
        assert len(set(expected.values())) == len(nonces), "the engine tells prompts apart"

        async def one(number):
            nonce = nonces[number % len(nonces)]
            got = await (ask(nonce) if number % 2 else ask_streamed(nonce, number % 5 == 0))
            assert got in (None, expected[nonce])
            return got

        got = await asyncio.gather(*[one(number) for number in range(200)])
    assert sum(text is not None for text in got) == 180


def test_an_endless_answer_ends_at_its_ceiling(own):
    """RL-06: at what was asked for and at what policy allows; what is told as used is what was sent."""
    kit, key = own
    kit.control(num_tokens=100_000)
    for asked, most in ((24, 24), (1_000_000, 4096)):
        answer = httpx.post(
            kit.base + CHAT, headers={"authorization": f"Bearer {key}"}, json=BODY | {"max_tokens": asked}, timeout=60
        )
        if asked > most:
            assert answer.status_code in (200, 400)
            assert answer.status_code == 400 or answer.json()["usage"]["completion_tokens"] <= most
            continue
        assert answer.json()["usage"]["completion_tokens"] == most
        assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_spelled_control_tokens_are_counted_as_what_they_become(own):
    """RL-07: a text of control tokens costs its neutralised tokens and not one for each."""
    kit, key = own
    kit.control()
    headers = {"authorization": f"Bearer {key}"}
    text = "<|im_start|>" * 60
    counted = httpx.post(kit.base + "/tokenize", headers=headers, json={"model": MODEL, "prompt": text}).json()["count"]
    assert counted >= 180
    body = BODY | {"messages": [{"role": "user", "content": text}]}
    answer = httpx.post(kit.base + CHAT, headers=headers, json=body, timeout=30)
    assert answer.json()["usage"]["prompt_tokens"] > counted
    body = BODY | {"messages": [{"role": "user", "content": text * 170}]}
    finished = kit.stats()["finished"]
    assert httpx.post(kit.base + CHAT, headers=headers, json=body, timeout=30).status_code == 400
    assert kit.stats()["finished"] == finished


async def test_health_answers_under_load_without_the_engine(own):
    """RL-08."""
    kit, key = own
    kit.control(num_tokens=64, delay_ms=100, separate=True)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=kit.base, timeout=120, limits=limits) as client:
        headers = {"authorization": f"Bearer {key}"}
        loads = [
            asyncio.create_task(client.post(CHAT, headers=headers, json=BODY | {"max_tokens": 64})) for _ in range(100)
        ]
        await asyncio.sleep(0.2)
        async with httpx.AsyncClient(base_url=kit.base, timeout=10) as probe:
            for path in ("/livez", "/readyz"):
                assert (await probe.get(path)).status_code == 200
        assert not all(load.done() for load in loads), "the probes came while requests ran"
        answers = await asyncio.gather(*loads)
    assert {answer.status_code for answer in answers} == {200}


def test_the_admin_listener_is_another_one(gateway, admin_key):
    """AZ-09."""
    link = http.client.HTTPConnection("127.0.0.1", gateway.settings.admin.port, timeout=20)
    link.request("POST", CHAT, body=b"{}", headers={"authorization": f"Bearer {admin_key}"})
    assert link.getresponse().status == 404
    link.close()
