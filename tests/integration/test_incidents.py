"""The incident switch as its callers meet it: who lifts what who opened; real sockets."""

import httpx
import pytest

from benchmarks.gateway.kit import MODEL


def call(kit, key, path, body=None):
    method = "GET" if body is None else "POST"
    return httpx.request(method, kit.admin + path, json=body, headers={"authorization": f"Bearer {key}"}, timeout=30)


@pytest.fixture(scope="module")
def platform(gateway):
    """Somebody who manages all tenants."""
    return gateway.working_key(groups={"security"}, subject="platform")


@pytest.fixture(scope="module")
def tenants_own(gateway):
    """Somebody who manages incidents of one tenant."""
    return gateway.working_key(groups={"security"}, scopes={"admin:incident:*"}, tenant="zeta", subject="guard")


def asks(gateway, key):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(gateway.base + "/v1/chat/completions", json=body, headers=headers, timeout=30).status_code


@pytest.mark.parametrize("first", ["platform", "tenant"])
def test_a_tenant_lifts_nothing_that_was_opened_across_tenants(gateway, platform, tenants_own, first):
    victim = gateway.working_key(groups={"developers"}, tenant="zeta", subject=first)
    wanted = {"kind": "subject", "target": f"zeta/{first}", "reason": "stolen"}
    openers = [platform] if first == "platform" else [tenants_own, platform]
    opened = [call(gateway, key, "/admin/incidents", wanted) for key in openers]
    assert [answer.status_code for answer in opened] == [201] * len(openers)
    number = opened[-1].json()["id"]
    assert number in [one["id"] for one in call(gateway, tenants_own, "/admin/incidents").json()["incidents"]]
    refused = call(gateway, tenants_own, f"/admin/incidents/{number}/lift", {})
    assert refused.status_code == 403, refused.text
    assert gateway.entries()[-1]["event"] == "admin:request:refused"
    for own in opened[:-1]:  # its own it may lift, and that helps nobody
        assert call(gateway, tenants_own, f"/admin/incidents/{own.json()['id']}/lift", {}).status_code == 200
    assert asks(gateway, victim) == 401
    assert call(gateway, platform, f"/admin/incidents/{number}/lift", {}).status_code == 200
    assert asks(gateway, victim) == 200


def test_a_tenant_lifts_its_own(gateway, tenants_own):
    victim = gateway.working_key(groups={"developers"}, tenant="zeta", subject="own")
    opened = call(gateway, tenants_own, "/admin/incidents", {"kind": "subject", "target": "zeta/own"})
    assert asks(gateway, victim) == 401
    assert call(gateway, tenants_own, f"/admin/incidents/{opened.json()['id']}/lift", {}).status_code == 200
    assert asks(gateway, victim) == 200
