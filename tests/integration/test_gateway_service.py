"""The routes beside the models': model list, scans, receipts, counts, health, metrics, rendering."""

import json

import httpx
import pytest

from benchmarks.gateway.kit import EMBEDDER, MODEL, wait_until
from server.api.public import MODEL_ROUTES
from tests.vectors.sarif.check import check_sarif

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


BAD = 'import os\nos.system("rm " + input())\n'
ITEMS = [{"text": "print(1)\n", "path": "ok.py"}, {"text": BAD, "path": "src/my app.py"}, {"text": BAD}]


def ask_scan(gateway, key, body):
    return httpx.post(gateway.base + "/v1/scan", json=body, headers=auth(key), timeout=60)


def test_a_batch_is_judged_item_by_item_and_is_on_record(gateway, key):
    items = [*ITEMS, {"text": BAD, "language": "python"}, {"text": "fn main() {}", "language": "rust"}]
    answer = ask_scan(gateway, key, {"items": items})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert (body["object"], body["state"]) == ("scan.batch", "unscanned")
    assert [one["index"] for one in body["items"]] == [0, 1, 2, 3, 4]
    assert [one["path"] for one in body["items"]] == ["ok.py", "src/my app.py", None, None, None]
    for item, verdict in zip(items, body["items"], strict=True):
        alone = ask_scan(gateway, key, item).json()
        assert {name: verdict[name] for name in ("state", "reason", "findings")} == {
            name: alone[name] for name in ("state", "reason", "findings")
        }
    assert [one["state"] for one in body["items"]][:2] == ["clean", "findings"]
    told = [e for e in gateway.entries() if e["event"] == "guard:text:scanned"]
    entry = next(e for e in told if e["request_id"] == answer.headers["x-request-id"])
    assert (entry["num_texts"], entry["num_chars"]) == (5, sum(len(item["text"]) for item in items))
    assert sum(entry["states"].values()) == 5
    assert entry["num_findings"] == sum(len(one["findings"]) for one in body["items"])
    assert (entry["findings"][0]["text"], entry["findings"][0]["cwe"]) == (1, "CWE-78")
    assert "my app" not in json.dumps(told)
    assert told[-1]["num_texts"] == 1  # one text is on record as well


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"items": [{"text": "x"}, {"text": 7}]}, "items[1].text"),
        ({"items": [{"text": "x"}, {}]}, "items[1].text"),
        ({"items": [{"text": "x", "path": 1}]}, "items[0].path"),
        ({"items": [{"text": "x", "language": "p" * 513}]}, "items[0].language"),
        ({"items": ["x"]}, "items[0]"),
        ({"items": []}, "items"),
        ({"items": [{"text": ""}] * 257}, "items"),
        ({"items": [{"text": "x" * 1_000_000}] * 5}, "items"),
        ({"items": [{"text": "x"}], "text": "x"}, "items"),
        ({"text": "x", "format": "xml"}, "format"),
        ({}, "text"),
    ],
)
def test_one_bad_item_refuses_the_batch_by_name(gateway, key, body, param):
    answer = ask_scan(gateway, key, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_a_batch_as_sarif_names_artifacts_by_path(gateway, key):
    log = ask_scan(gateway, key, {"items": [*ITEMS, {"text": "x", "language": "rust"}], "format": "sarif"}).json()
    check_sarif(log)
    places = [result["locations"][0]["physicalLocation"] for result in log["runs"][0]["results"]]
    assert "src/my%20app.py" in {place["artifactLocation"]["uri"] for place in places}
    one = ask_scan(gateway, key, {"text": BAD, "path": "a.py", "format": "sarif"}).json()
    check_sarif(one)
    (result,) = one["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "a.py"
    assert result["locations"][0]["physicalLocation"]["region"]["startLine"] == 2


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


def test_rendering_what_one_may_not_ask_is_refused_on_record(gateway):
    """Operators may see prompts, and reach no model by themselves."""
    key = gateway.working_key(groups={"operators"}, subject="renders")
    asked = {"path": "/v1/chat/completions", "body": {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}}
    headers = {"authorization": f"Bearer {key}"}
    answer = httpx.post(gateway.admin + "/admin/render", json=asked, headers=headers, timeout=30)
    assert answer.status_code == 403, answer.text
    last = gateway.entries()[-1]
    assert (last["event"], last["route"], last["action"]) == (
        "admin:request:refused",
        "/admin/render",
        "model:chat:create",
    )
