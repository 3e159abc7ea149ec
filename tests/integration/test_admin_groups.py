"""Each route of the admin listener against each group of the default policies; real sockets."""

from typing import Any

import httpx
import pytest

from benchmarks.gateway.kit import MODEL
from tests.abuse.test_auth_matrix import ADMIN_ROUTES

GROUPS = (
    "developers", "leads", "ci", "reviewers", "extractors", "auditors", "operators", "security", "visitors", ""
)  # fmt: skip
STAFF = {"auditors", "operators", "security"}
MAY = {
    ("GET", "/metrics"): {"operators", "leads"},
    ("POST", "/admin/render"): {"operators", "security"},
    ("GET", "/admin/status"): {"operators", "auditors"},
    ("GET", "/admin/keys"): STAFF,
    ("POST", "/admin/keys"): {"security"},
    ("GET", "/admin/keys/{key_id}"): STAFF,
    ("POST", "/admin/keys/{key_id}/rotate"): {"security"},
    ("POST", "/admin/keys/{key_id}/revoke"): {"security"},
    ("GET", "/admin/policy"): STAFF,
    ("POST", "/admin/policy/reload"): {"security"},
    ("POST", "/admin/policy/why"): STAFF,
    ("GET", "/admin/usage"): STAFF | {"leads"},
    ("GET", "/admin/incidents"): STAFF,
    ("POST", "/admin/incidents"): {"security"},
    ("POST", "/admin/incidents/{incident_id}/lift"): {"security"},
}
BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/admin/incidents"): {"kind": "model", "target": "none"},
    ("POST", "/admin/render"): {"path": "/tokenize", "body": {"model": MODEL, "prompt": "hi"}},
}


def test_the_table_names_every_route():
    assert set(MAY) == set(ADMIN_ROUTES)


@pytest.fixture(scope="module")
def keys(gateway):
    drawn = {group: gateway.new_key(groups={group} - {""}, subject=f"in-{group}") for group in GROUPS}
    for key in drawn.values():
        gateway.wait_for_key(key)
    return drawn


@pytest.mark.parametrize(("method", "path"), MAY)
def test_a_group_reaches_what_is_its_own_and_nothing_else(gateway, keys, method, path):
    body = BODIES.get((method, path), ADMIN_ROUTES[method, path])
    for group, key in keys.items():
        url = gateway.admin + path.format(key_id="none", incident_id="99999")
        answer = httpx.request(method, url, json=body, headers={"authorization": f"Bearer {key}"}, timeout=30)
        if group in MAY[method, path]:
            assert answer.status_code in (200, 201, 400, 404), (group, answer.text)
        else:
            assert answer.status_code == 403, (group, answer.text)
            last = gateway.entries()[-1]
            assert (last["event"], last["subject"]) == ("admin:request:refused", f"in-{group}")
