"""docs/policy.md and docs/identity.md name everything that there is."""

from dataclasses import fields
from pathlib import Path

import pytest

from server.policy.limit_file import Rule
from server.policy.obligations import _KNOWN, STAND_INS
from server.policy.permissions import Permission
from server.store.incidents import Quarantined
from server.types import ScanMode

ROOT = Path(__file__).resolve().parents[2]
POLICY = (ROOT / "docs" / "policy.md").read_text()
IDENTITY = (ROOT / "docs" / "identity.md").read_text()
LIMITS = [field.name.replace("cost_micros_", "cost_") for field in fields(Rule)]


@pytest.mark.parametrize("name", [*Permission, *LIMITS, *STAND_INS, *ScanMode, *[f"@{name}" for name in _KNOWN]])
def test_policy_page_names(name):
    assert f"`{name}`" in POLICY


@pytest.mark.parametrize("kind", list(Quarantined))
def test_identity_page_names(kind):
    assert kind in IDENTITY


@pytest.mark.parametrize("act", ["create", "rotate", "revoke", "import", "rotate-pepper"])
def test_identity_page_shows(act):
    assert f"strongroom keys {act}" in IDENTITY


def test_default_groups_are_the_ones_of_the_default_set():
    text = "".join(path.read_text() for path in (ROOT / "configs" / "policy").glob("*.cedar"))
    for group in ("developers", "leads", "ci", "auditors", "operators", "security"):
        assert f'Group::"{group}"' in text
        assert f"| `{group}` |" in POLICY
