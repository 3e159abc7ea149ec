"""Over the socket: every tenant finds its own figures in `/metrics`, and no sign of another's."""

import re

import httpx
import pytest

from benchmarks.gateway.kit import MODEL, wait_until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}


@pytest.fixture(scope="module")
def people(gateway):
    """Keys of two tenants' leads, of a visitor of one, and of an operator."""
    found = {
        "north": gateway.new_key(tenant="north", subject="nora", groups={"developers", "leads"}),
        "south": gateway.new_key(tenant="south", subject="saul", groups={"developers", "leads", "south-secret-team"}),
        "visitor": gateway.new_key(tenant="south", subject="vic", groups={"visitors"}),
        "operator": gateway.new_key(tenant="house", subject="olga", groups={"operators"}),
    }
    for key in found.values():
        gateway.wait_for_key(key)
    return found


def auth(key):
    return {"authorization": f"Bearer {key}"}


def ask(gateway, key):
    return httpx.post(gateway.base + "/v1/chat/completions", json=CHAT, headers=auth(key))


def read(gateway, key):
    answer = httpx.get(gateway.admin + "/metrics", headers=auth(key))
    assert answer.status_code == 200, answer.text
    return answer.text


def count(text, name, **labels):
    """The value of a series; 0 where there is none."""
    inner = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    found = re.search(re.escape(f"{name}{{{inner}}}") + r" (\S+)", text)
    return float(found[1]) if found else 0.0


def test_a_tenant_sees_its_own_requests_and_no_sign_of_another(gateway, people):
    before = read(gateway, people["north"])
    answers = [ask(gateway, people[who]) for who in ("north", "north", "south")]
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    usage = answers[0].json()["usage"]
    assert ask(gateway, people["visitor"]).status_code == 403
    # A request is counted when its last byte has left, which may be a moment after it came.
    wait_until(lambda: count(read(gateway, people["south"]), "strongroom_tenant_errors_total",
                             code="permission_denied", tenant="south") == 1)  # fmt: skip

    north = read(gateway, people["north"])
    done = {"outcome": "completed", "tenant": "north"}
    assert count(north, "strongroom_tenant_requests_total", **done) == 2 + count(
        before, "strongroom_tenant_requests_total", **done
    )
    assert count(north, "strongroom_tenant_tokens_total", kind="completion", tenant="north") == 2 * (
        usage["completion_tokens"]
    ) + count(before, "strongroom_tenant_tokens_total", kind="completion", tenant="north")
    assert count(north, "strongroom_tenant_time_to_first_token_seconds_count", tenant="north") >= 2
    # Nothing but its own series: no other tenant, team, model or person, and no sum over everybody.
    assert set(re.findall(r'tenant="([^"]*)"', north)) == {"north"}
    lines = [line for line in north.splitlines() if not line.startswith("#")]
    assert all(line.startswith("strongroom_tenant_") for line in lines)
    for name in ("south", "house", "saul", "vic", "secret-team", MODEL, "vllm"):
        assert name not in north

    south = read(gateway, people["south"])
    assert count(south, "strongroom_tenant_requests_total", outcome="completed", tenant="south") == 1
    assert count(south, "strongroom_tenant_requests_total", outcome="denied", tenant="south") == 1
    assert "north" not in south


def test_whoever_sees_all_tenants_gets_everything(gateway, people):
    for who in ("north", "south"):
        ask(gateway, people[who])
    text = read(gateway, people["operator"])
    assert {"north", "south"} <= set(re.findall(r'tenant="([^"]*)"', text))
    assert "strongroom_requests_total" in text
    assert "vllm:" in text
    assert "south-secret-team" not in text


def test_metrics_are_for_holders_of_the_permission(gateway, people):
    refused = httpx.get(gateway.admin + "/metrics", headers=auth(people["visitor"]))
    assert refused.status_code == 403
    narrow = gateway.new_key(tenant="north", subject="nina", groups={"leads"}, scopes={"model:*"})
    gateway.wait_for_key(narrow)
    assert httpx.get(gateway.admin + "/metrics", headers=auth(narrow)).status_code == 403
    # Scopes narrow what is seen too: an operator's key without the cross-tenant scope sees its own tenant.
    own = gateway.new_key(tenant="house", subject="otto", groups={"operators"}, scopes={"admin:metrics:*", "model:*"})
    gateway.wait_for_key(own)
    assert set(re.findall(r'tenant="([^"]*)"', read(gateway, own))) <= {"house"}
