"""Every route that reaches a model, against every control: a route that lacks one fails here."""

import json
from typing import Any

import httpx
import pytest

from benchmarks.gateway.kit import EMBEDDER, MODEL
from server.api.public import MODEL_ROUTES

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": MODEL, "prompt": "def f():"},
    "/v1/responses": {"model": MODEL, "input": "hi"},
    "/v1/messages": {"model": MODEL, "max_tokens": 32, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/embeddings": {"model": EMBEDDER, "input": "hi"},
    "/v1/fim/completions": {"model": MODEL, "prompt": "def f():", "suffix": "\n"},
    "/infill": {"model": MODEL, "input_prefix": "def f():", "input_suffix": "\n"},
}
ROUTES = [route for route, _ in MODEL_ROUTES]
STREAMED = [route for route in ROUTES if route != "/v1/embeddings"]


def post(gateway, route, body=None, key=None, **options):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    headers |= options.pop("headers", {})
    options.setdefault("json", body if body is not None else BODIES[route])
    return httpx.post(gateway.base + route, headers=headers, timeout=20, **options)


def entries_of(gateway, response):
    request_id = response.headers["x-request-id"]
    return [entry for entry in gateway.entries() if entry.get("request_id") == request_id]


def error_of(route, response):
    """The error object, wherever the route's dialect keeps it; its shape is checked on the way."""
    body = response.json()
    error = body["error"]
    assert isinstance(error["message"], str)
    assert error["message"]
    if route.startswith("/v1/messages"):
        assert body["type"] == "error"
        assert isinstance(error["type"], str)
    else:
        assert set(error) >= {"message", "type", "param", "code"}
    return error


def test_the_table_has_a_body_for_every_route():
    assert set(BODIES) == set(ROUTES)


@pytest.mark.parametrize("route", ROUTES)
def test_answers_with_template_scan_and_two_records(gateway, key, route):
    response = post(gateway, route, key=key)
    assert response.status_code == 200, response.text
    accepted, finished = entries_of(gateway, response)
    assert accepted["event"] == "gateway:request:accepted"
    assert finished["event"] == "gateway:request:finished"
    assert finished["outcome"] == "completed"
    assert accepted["template"]["digest"] == response.headers["x-strongroom-template-digest"]
    assert response.headers["x-strongroom-template"].startswith("secure-coding@")
    assert response.headers["x-strongroom-input-scan"] == "clean"
    assert accepted["scan_input"]["state"] == "clean"
    assert accepted["policy"]["ids"]
    assert accepted["prompt"]["tokens"] > 0
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "server" not in response.headers


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Basic c2VjcmV0"},
        {"authorization": "Bearer sr_aaaaaaaaaaaa_" + "b" * 43},
        {"authorization": "Bearer \u00ff\u00fe"},
        {"x-api-key": "'; drop table keys; --"},
        {"api-key": "x" * 70_000},
        {"cookie": "api_key=KEY"},
    ],
)
def test_refuses_what_is_no_key_in_one_form_and_on_record(gateway, key, route, headers):
    headers = {name: value.replace("KEY", key).encode("latin-1") for name, value in headers.items()}
    response = httpx.post(f"{gateway.base}{route}?api_key={key}", json=BODIES[route], headers=headers)
    if len(headers.get("api-key", b"")) > 60_000:
        assert response.status_code == 431
        return
    assert response.status_code == 401
    assert error_of(route, response)["message"].startswith("The API key is missing or not valid.")
    (entry,) = entries_of(gateway, response)
    assert entry["event"] == "gateway:credential:refused"
    assert key not in json.dumps(entry)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("header", ["authorization", "x-api-key", "api-key"])
def test_takes_the_key_from_each_documented_header(gateway, key, route, header):
    value = f"Bearer {key}" if header == "authorization" else key
    empty = "api-key" if header != "api-key" else "x-api-key"
    assert post(gateway, route, headers={header: value, empty: ""}).is_success


@pytest.mark.parametrize("route", ROUTES)
def test_refuses_two_different_keys_or_a_header_sent_twice(gateway, key, route):
    other = gateway.new_key(groups={"developers"}, subject="other")
    both = {"authorization": f"Bearer {key}", "x-api-key": other}
    assert post(gateway, route, headers=both).status_code == 401
    twice = [("authorization", f"Bearer {key}"), ("authorization", f"Bearer {key}")]
    assert httpx.post(gateway.base + route, json=BODIES[route], headers=twice).status_code == 401


@pytest.mark.parametrize("route", ROUTES)
def test_a_scope_narrows_the_key_in_every_header_form(gateway, route):
    narrow = gateway.new_key(groups={"developers"}, scopes={"model:model:list"}, subject="narrow")
    gateway.wait_for_key(narrow)
    for headers in ({"authorization": f"Bearer {narrow}"}, {"x-api-key": narrow}, {"api-key": narrow}):
        response = post(gateway, route, headers=headers)
        assert response.status_code == 403
        assert error_of(route, response)["code"] == "permission_denied"
        (entry,) = entries_of(gateway, response)
        assert entry["outcome"] == "denied"


@pytest.mark.parametrize("route", ROUTES)
def test_a_key_in_no_group_is_refused(gateway, visitor_key, route):
    assert post(gateway, route, key=visitor_key).status_code == 403


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("content", "content_type", "status"),
    [
        (b"", "application/json", 400),
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'{"model":"a","model":"b"}', "application/json", 400),
        (b'{"a":' + b"[" * 1000 + b"]" * 1000 + b"}", "application/json", 400),
        (b'{"a":NaN}', "application/json", 400),
        ('{"model":"a"}'.encode("utf-16"), "application/json", 400),
        (b"a=b", "application/x-www-form-urlencoded", 415),
        (b"{}", "text/plain", 415),
        (b'{"model":' + b" " * (9 * 1024 * 1024) + b'"x"}', "application/json", 413),
    ],
)
def test_refuses_a_body_that_is_no_json_and_goes_on(gateway, key, route, content, content_type, status):
    headers = {"content-type": content_type}
    response = post(gateway, route, key=key, json=None, content=content, headers=headers)
    assert response.status_code == status
    error_of(route, response)
    assert post(gateway, route, key=key).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_a_body_over_the_limit_is_refused_also_without_its_length(gateway, key, route):
    def pieces():
        for _ in range(100):
            yield b" " * (1024 * 1024)

    response = post(gateway, route, key=key, json=None, content=pieces(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    error_of(route, response)


@pytest.mark.parametrize("route", ROUTES)
def test_an_unknown_model_is_a_404_with_its_code(gateway, key, route):
    for name in ("nope", "../../etc/passwd", "https://evil.example/model", "a" * 100):
        response = post(gateway, route, {**BODIES[route], "model": name}, key)
        assert response.status_code == 404
        assert error_of(route, response)["code"] == "model_not_found"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("field", ["chat_template", "prompt_embeds", "kv_transfer_params", "cache_salt", "api_base"])
def test_a_refused_field_is_a_400_by_name(gateway, key, route, field):
    response = post(gateway, route, {**BODIES[route], field: "x"}, key)
    assert response.status_code == 400
    assert field in error_of(route, response)["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_unknown_fields_change_nothing(gateway, key, route):
    extra = {"tenant": "b", "role": "admin", "policy": "none", "template": "none", "user_id": 1, "__proto__": {}}
    response = post(gateway, route, {**BODIES[route], **extra}, key)
    assert response.status_code == 200
    accepted, _ = entries_of(gateway, response)
    assert accepted["principal"]["tenant"] == "a"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"])
def test_other_methods_are_405(gateway, key, route, method):
    response = httpx.request(method, gateway.base + route, headers={"authorization": f"Bearer {key}"})
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("route", ROUTES)
def test_path_variants_are_404(gateway, key, route):
    for variant in (f"/{route}", f"{route}/", route.upper(), route.replace("/", "/./", 1), f"{route};x"):
        response = httpx.post(gateway.base + variant, json=BODIES[route], headers={"authorization": f"Bearer {key}"})
        assert response.status_code in (404, 200 if httpx.URL(gateway.base + variant).path == route else 404)


@pytest.mark.parametrize("route", STREAMED)
def test_streams_and_ends_whole(gateway, key, route):
    response = post(gateway, route, {**BODIES[route], "stream": True}, key)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert events
    last = events.pop() if events[-1] == "[DONE]" else None
    assert (last is not None) == (route in ("/v1/chat/completions", "/v1/completions", "/v1/fim/completions"))
    for event in events:
        json.loads(event)
    accepted, finished = entries_of(gateway, response)
    assert finished["outcome"] == "completed"
    assert finished["accepted"] == int(response.headers["x-strongroom-audit-index"])
    assert accepted["stream"] is True


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/fim/completions", "/infill"])
def test_what_surrounds_a_cursor_is_trimmed_to_fit(gateway, key, route):
    long = "word " * 8000
    text = json.dumps(BODIES[route] | ({"suffix": "\n"} if route == "/v1/completions" else {}))
    body = json.loads(text.replace('"def f():"', json.dumps(long)).replace('"\\n"', json.dumps(long)))
    response = post(gateway, route, body, key)
    assert response.status_code == 200, response.text
    accepted, _ = entries_of(gateway, response)
    assert 2000 < accepted["prompt"]["tokens"] <= 4096 - 256


@pytest.mark.parametrize("route", [route for route in STREAMED if route not in ("/v1/fim/completions", "/infill")])
def test_a_prompt_past_the_context_is_refused_with_the_words_clients_match(gateway, key, route):
    long = "word " * 8000
    text = json.dumps(BODIES[route]).replace('"hi"', json.dumps(long))
    body = json.loads(text.replace('"def f():"', json.dumps(long)))
    response = post(gateway, route, body, key)
    assert response.status_code == 400
    error = error_of(route, response)
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 4096 tokens. However" in error["message"]
