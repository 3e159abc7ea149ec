"""Whatever is asked: deny by default, strictest obligations, and nothing left out that could matter."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import override

from server.policy.cedar import PolicySet, Question
from server.policy.obligations import _SCAN_MODES, merge_obligations
from server.policy.permissions import GENERATING, Permission, covers
from server.types import Obligations, ScanMode

FOLDER = Path("configs/policy")
KNOWN_GROUPS = ("developers", "leads", "ci", "auditors", "operators", "security")
MORE = """
@id("night")
forbid (principal, action, resource) when { context.hour < 6 && principal.tenant == "acme" };
@id("office")
forbid (principal, action, resource)
when { context has wire && context.wire == "openai.chat" } unless { context.network.isInRange(ip("10.0.0.0/8")) };
"""

texts = st.text(max_size=30)
questions = st.builds(
    Question,
    subject=texts,
    tenant=st.sampled_from(["acme", "zeta", ""]) | texts,
    groups=st.frozensets(st.sampled_from(KNOWN_GROUPS) | texts, max_size=4),
    scopes=st.frozensets(st.sampled_from(["*", "model:*"]) | texts, max_size=3),
    method=st.sampled_from(["api_key", "oidc", "mtls"]),
    action=st.sampled_from(sorted(Permission)),
    model=texts,
    stage=st.sampled_from(["live", "canary", "candidate", "retired"]),
    classification=st.sampled_from(["public", "internal", "confidential", "restricted"]),
    licence=texts,
    wire=st.sampled_from(["openai.chat", "mistral.fim"]),
    num_tokens=st.sampled_from([1, 512, 1 << 18, 1 << 19]),
    stream=st.booleans(),
    data=st.sampled_from(["public", "internal", "confidential", "restricted"]) | texts,
    address=st.ip_addresses().map(str) | texts,
    client=texts,
    hour=st.integers(0, 23),
    weekday=st.integers(1, 7),
)


@pytest.fixture(scope="module")
def policies():
    return PolicySet.load(FOLDER)


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    for path in FOLDER.glob("*.cedar*"):
        (folder / path.name).write_text(path.read_text())
    (folder / "95-more.cedar").write_text(MORE)
    return PolicySet.load(folder)


@given(questions)
@settings(max_examples=300, deadline=None)
def test_nobody_outside_the_groups_gets_anything(policies, question):
    decision = policies.ask(question._replace(groups=question.groups - set(KNOWN_GROUPS)))
    assert not decision.allowed
    assert decision.reason


@given(questions)
@settings(max_examples=300, deadline=None)
def test_every_permit_to_compute_carries_its_demands(policies, question):
    decision = policies.ask(question)
    if decision.allowed and question.action in GENERATING:
        assert decision.obligations.templates
        assert decision.obligations.max_tokens is not None
        assert decision.policies
    if question.stage == "retired" and question.action in GENERATING:
        assert not decision.allowed


@given(questions, questions)
@settings(max_examples=300, deadline=None)
def test_what_a_set_does_not_look_at_changes_nothing(policies, busy, question, other):
    for one in (policies, busy):
        ignored = set(Question._fields) - one.reads - {"groups", "scopes", "action", "model"}
        changed = question._replace(**{name: getattr(other, name) for name in ignored})
        assert one.ask(changed) == one.ask(question)


TEAMS = "".join(
    f"""
@id("team{number}")
@template("secure-coding")
@scan_input("annotate")
@scan_output("annotate")
@max_tokens("{1000 + number}")
permit ({head}, action {actions}, resource {resource}) when {{ {condition} }};
"""
    for number, (head, actions, resource, condition) in enumerate(
        (head, actions, resource, condition)
        for head in (
            'principal in Group::"team1"',
            'principal is User in Group::"team2"',
            "principal is User",
            'principal == User::"acme/ana"',
            'principal in User::"acme/ana"',
        )
        for actions, resource, condition in (
            ('== Action::"model:chat:create"', "is Model", 'context.data == "internal"'),
            ('in [Action::"model:chat:create", Action::"model:message:create"]', "", "context.hour > 3"),
            # Fails where the number is too large: what may fail decides too.
            ('== Action::"model:chat:create"', "", "context.tokens * 9000000000000000000 > 0"),
        )
    )
)


class Whole(PolicySet):
    """Asks all policies of every question."""

    @override
    def _slice(self, question):
        return self._handle


@pytest.fixture(scope="module")
def team_sets(tmp_path_factory):
    """The same policies twice: asked by slices, and always asked whole."""
    folder = tmp_path_factory.mktemp("teams")
    for path in FOLDER.glob("*.cedar*"):
        (folder / path.name).write_text(path.read_text())
    (folder / "95-teams.cedar").write_text(MORE + TEAMS)
    return PolicySet.load(folder), Whole.load(folder)


@given(questions, st.frozensets(st.sampled_from([*KNOWN_GROUPS, "team1", "team2", "team3"])), st.data())
@settings(max_examples=500, deadline=None)
def test_asking_a_slice_answers_as_asking_all_policies(team_sets, question, groups, data):
    sliced, whole = team_sets
    action = data.draw(st.sampled_from(["model:chat:create", "model:message:create", question.action]))
    subject, tenant = data.draw(st.sampled_from([("ana", "acme"), (question.subject, question.tenant)]))
    question = question._replace(groups=groups, action=action, subject=subject, tenant=tenant)
    assert sliced.ask(question) == whole.ask(question)


obligations = st.builds(
    Obligations,
    templates=st.lists(st.sampled_from(["a", "b", "c"]), unique=True).map(tuple),
    stand_in=st.sampled_from(["", "none", "raw", "fim", "comment-preamble", "template-as-text"]),
    scan_input=st.sampled_from(list(ScanMode)),
    scan_output=st.sampled_from(list(ScanMode)),
    max_tokens=st.none() | st.integers(1, 10),
    tools_allowed=st.none() | st.frozensets(st.sampled_from(["x", "y"])).map(lambda names: tuple(sorted(names))),
    ban_tokens=st.frozensets(st.sampled_from(["x", "y"])).map(lambda names: tuple(sorted(names))),
    audit_text=st.booleans(),
    egress_findings=st.booleans(),
)


@given(st.lists(obligations, min_size=1, max_size=4))
def test_merged_is_never_more_lenient_than_any(applied):
    merged = merge_obligations(applied)
    for one in applied:
        assert set(one.templates) <= set(merged.templates)
        assert _SCAN_MODES.index(merged.scan_input) >= _SCAN_MODES.index(one.scan_input)
        assert _SCAN_MODES.index(merged.scan_output) >= _SCAN_MODES.index(one.scan_output)
        assert one.max_tokens is None or (merged.max_tokens is not None and merged.max_tokens <= one.max_tokens)
        if one.tools_allowed is not None:
            assert merged.tools_allowed is not None
            assert set(merged.tools_allowed) <= set(one.tools_allowed)
        assert set(one.ban_tokens) <= set(merged.ban_tokens)
        assert merged.audit_text >= one.audit_text
        assert merged.egress_findings <= one.egress_findings


@given(st.frozensets(texts, max_size=5), st.sampled_from(sorted(Permission)))
def test_a_scope_reaches_only_what_it_names_or_begins(scopes, action):
    if covers(scopes, action):
        assert any(
            scope in (action, "*") or (scope.endswith(":*") and action.startswith(scope[:-1])) for scope in scopes
        )
