"""The list of events, the specification's table and the code name the same."""

import re

from server.audit.tags import Event
from server.policy.permissions import Permission
from tests.unit.audit.audit_kit import ROOT

_TAG = re.compile(r"(?:gateway|audit|weights|supervisor|admin|guard):[a-z-]+:[a-z-]+")


def test_the_specification_lists_every_event_and_no_other():
    text = (ROOT / "docs/specs/audit-log.md").read_text().partition("## 3. Events")[2].partition("## 4.")[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    assert sorted(tag for row in rows for tag in _TAG.findall(row)) == sorted(Event)


def test_the_code_records_every_event_and_no_other():
    named, spelled = set(), set()
    for path in (ROOT / "server").rglob("*.py"):
        if path.name not in ("tags.py", "shapes.py"):
            text = path.read_text()
            named |= set(re.findall(r"Event\.([A-Z_]+)", text))
            spelled |= set(re.findall(rf'"({_TAG.pattern})"', text))
    permissions = {str(permission) for permission in Permission}
    assert spelled - permissions <= {str(event) for event in Event}
    silent = {event for event in Event if event.name not in named and event.value not in spelled}
    assert silent == {Event.ACT_PERFORMED}  # kept for acts that get no event of their own; the tests' plain entry
