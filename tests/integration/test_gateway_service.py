"""The routes beside the models': model list, scans, receipts, counts, health, metrics, rendering."""

import json

import httpx
import pytest

from benchmarks.gateway.kit import EMBEDDER, MODEL, wait_until
from server.api.public import MODEL_ROUTES

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


def auth(key):
    return {"authorization": f"Bearer {key}"}


def test_health_gives_nothing_away(gateway):
    for path in ("/livez", "/readyz"):
        response = httpx.get(gateway.base + path)
        assert (response.status_code, response.text) == (200, "ok\n")
    head = httpx.head(gateway.base + "/")
    assert (head.status_code, head.content) == (200, b"")


@pytest.mark.parametrize(
    "path", ["/docs", "/redoc", "/openapi.json", "/metrics", "/admin/render", "/env", "/.git/config"]
)
def test_nothing_else_is_there(gateway, key, path):
    response = httpx.get(gateway.base + path, headers=auth(key))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/default", "/v1/audit/receipt/0"])
def test_lists_and_receipts_want_a_key(gateway, path):
    assert httpx.get(gateway.base + path).status_code == 401


@pytest.mark.parametrize("path", ["/v1/scan", "/tokenize", "/v1/messages/count_tokens"])
def test_services_want_a_key_and_a_permission(gateway, visitor_key, path):
    assert httpx.post(gateway.base + path, json={}).status_code == 401
    bodies = {"/v1/scan": {"text": "x"}, "/tokenize": {"model": MODEL, "prompt": "x"}}
    response = httpx.post(gateway.base + path, json=bodies.get(path, CHAT), headers=auth(visitor_key))
    assert response.status_code == 403


def test_models_in_both_dialects_without_paths(gateway, key):
    openai = httpx.get(gateway.base + "/v1/models", headers=auth(key)).json()
    assert {model["id"] for model in openai["data"]} == {MODEL, EMBEDDER, "default", "autocomplete"}
    assert all(model["max_model_len"] > 0 for model in openai["data"])
    assert str(gateway.state) not in json.dumps(openai)
    anthropic = httpx.get(gateway.base + "/v1/models", headers={**auth(key), "anthropic-version": "2023-06-01"}).json()
    assert anthropic["has_more"] is False
    assert anthropic["data"][0]["type"] == "model"
    one = httpx.get(gateway.base + "/v1/models/default", headers=auth(key)).json()
    assert one["object"] == "model"
    missing = httpx.get(gateway.base + "/v1/models/nope", headers=auth(key))
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_a_scan_finds_and_says_where(gateway, key):
    text = 'import os\nos.system("rm " + input())\n'
    answer = httpx.post(
        gateway.base + "/v1/scan", json={"text": text, "language": "python"}, headers=auth(key), timeout=30
    )
    assert answer.status_code == 200
    body = answer.json()
    assert body["state"] == "findings"
    assert body["findings"][0]["cwe"] == "CWE-78"
    assert body["findings"][0]["line"] == 2


def test_a_receipt_is_for_its_owner_alone(gateway, key):
    response = httpx.post(gateway.base + "/v1/chat/completions", json=CHAT, headers=auth(key))
    index = response.headers["x-strongroom-audit-index"]

    def ask():
        return httpx.get(f"{gateway.base}/v1/audit/receipt/{index}", headers=auth(key))

    if ask().status_code != 200:  # not under a published checkpoint yet: 503 says to try again in a second
        assert ask().headers.get("retry-after", "1") == "1"
    wait_until(lambda: ask().status_code == 200, limit_s=10, pause_s=0.1)
    receipt = ask()
    assert receipt.json()["entry"]["request_id"] == response.headers["x-request-id"]
    other = gateway.new_key(groups={"developers"}, subject="somebody-else")
    gateway.wait_for_key(other)
    theirs = httpx.get(f"{gateway.base}/v1/audit/receipt/{index}", headers=auth(other))
    nobodys = httpx.get(f"{gateway.base}/v1/audit/receipt/99999999", headers=auth(other))
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.content == nobodys.content


def test_counts_are_what_a_request_would_be_charged(gateway, key):
    served = httpx.post(gateway.base + "/v1/chat/completions", json=CHAT, headers=auth(key))
    entry = next(e for e in gateway.entries() if e.get("request_id") == served.headers["x-request-id"])
    counted = httpx.post(gateway.base + "/v1/messages/count_tokens", json=CHAT, headers=auth(key)).json()
    assert counted["input_tokens"] == entry["prompt"]["tokens"]
    tokenized = httpx.post(gateway.base + "/tokenize", json=CHAT, headers=auth(key)).json()
    assert tokenized["count"] == entry["prompt"]["tokens"]
    assert "tokens" not in tokenized
    raw = httpx.post(gateway.base + "/tokenize", json={"model": MODEL, "prompt": "abc"}, headers=auth(key)).json()
    assert raw["count"] == len(raw["tokens"])


def test_metrics_count_and_carry_the_engines_own(gateway, key, admin_key):
    httpx.post(gateway.base + "/v1/chat/completions", json=CHAT, headers=auth(key))
    assert httpx.get(gateway.admin + "/metrics").status_code == 401
    assert httpx.get(gateway.admin + "/metrics", headers=auth(key)).status_code == 403
    text = httpx.get(gateway.admin + "/metrics", headers=auth(admin_key)).text
    assert 'strongroom_requests_total{model="tiny-coder",outcome="completed",route="/v1/chat/completions"' in text
    assert "vllm:num_requests_running" in text
    assert key not in text


@pytest.mark.parametrize("path", [route for route, _ in MODEL_ROUTES])
def test_render_shows_what_would_go_to_the_engine(gateway, admin_key, key, path):
    from tests.integration.test_gateway_routes import BODIES

    ask = {"path": path, "body": BODIES[path]}
    assert httpx.post(gateway.admin + "/admin/render", json=ask, headers=auth(key)).status_code == 403
    response = httpx.post(gateway.admin + "/admin/render", json=ask, headers=auth(admin_key))
    assert response.status_code == 200, response.text
    shown = response.json()
    assert set(shown["template"]) == {"id", "version", "digest"}
    assert shown["text"]
    assert isinstance(shown["token_ids"], list)
    bad = {"path": path, "body": {**BODIES[path], "chat_template": "x"}}
    refused = httpx.post(gateway.admin + "/admin/render", json=bad, headers=auth(admin_key))
    own = httpx.post(gateway.base + path, json=bad["body"], headers=auth(admin_key))
    assert refused.status_code == own.status_code == 400
    assert refused.json()["error"]["message"] == own.json()["error"]["message"]
