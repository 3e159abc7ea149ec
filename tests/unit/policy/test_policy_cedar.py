"""Policies: loading, deciding, obligations, reload."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from server.api.public import MODEL_ROUTES
from server.errors import ConfigError
from server.policy.cases import load_cases, run_cases
from server.policy.cedar import PolicySet, Question
from server.policy.engine import ModelFacts, PolicyEngine
from server.policy.permissions import FOR_WIRE_FORMAT, GENERATING, Permission, covers, parse_scope
from server.store.incidents import Incident, Quarantine, Quarantined
from server.types import (
    Chat,
    Client,
    ModelRequest,
    Principal,
    ScanMode,
    SubjectId,
    TenantId,
    WireFormat,
)

FOLDER = Path("configs/policy")
HERE = Client("10.0.0.1", "openai/3.54")
GOOD = """
@id("chat")
@template("secure-coding")
@scan_input("off")
@scan_output("block")
@max_tokens("10")
permit (principal, action == Action::"model:chat:create", resource);
"""


@pytest.fixture(scope="module")
def policies():
    return PolicySet.load(FOLDER)


@pytest.fixture
def folder(tmp_path):
    shutil.copy(FOLDER / "schema.cedarschema", tmp_path)
    (tmp_path / "a.cedar").write_text(GOOD)
    return tmp_path


def new_principal(**changes):
    values = {
        "subject": SubjectId("ana"), "tenant": TenantId("acme"), "groups": frozenset({"developers"}),
        "scopes": frozenset({"model:*"}), "method": "api_key", "credential_id": "k1",
    }  # fmt: skip
    return Principal(**(values | changes))


def new_request(**changes):
    values: dict[str, Any] = {
        "wire_format": WireFormat.CHAT, "model": "m", "payload": Chat(({"role": "user", "content": "hello"},)),
        "sampling": {},
    }  # fmt: skip
    return ModelRequest(**(values | changes))


def new_engine(folder=FOLDER, **changes):
    values = {"models": {"m": ModelFacts()}.get, "clock": lambda: 1_800_000_000.0}
    return PolicyEngine.load(folder, **(values | changes))


def test_the_cases_of_the_default_set_hold(policies):
    cases = load_cases(FOLDER / "cases.yaml")
    assert len(cases) > 20
    assert run_cases(policies, cases) == []


def test_a_case_that_does_not_hold_is_told(policies):
    cases = load_cases(FOLDER / "cases.yaml")
    turned = [case.__class__(case.name, case.question, not case.is_allowed, None, {}) for case in cases]
    assert len(run_cases(policies, turned)) == len(cases)


def test_an_answer_names_the_policy_and_its_demands():
    decision = new_engine().decide(new_principal(), "model:chat:create", new_request(), HERE)
    assert decision.allowed
    assert decision.policies == ("developers-chat",)
    assert decision.obligations.templates == ("secure-coding",)
    assert len(decision.policy_digest) == 64


@pytest.mark.parametrize("action", sorted(Permission))
def test_nothing_is_permitted_without_a_policy(action):
    engine = new_engine()
    stranger = new_principal(groups=frozenset(), scopes=frozenset({"*"}))
    assert not engine.decide(stranger, action, new_request(), HERE).allowed


@pytest.mark.parametrize("action", sorted(GENERATING))
def test_whatever_reaches_a_model_carries_demands(action):
    for group in ("developers", "leads", "ci", "operators", "security", "auditors"):
        for stage in ("candidate", "canary", "live", "retired"):
            engine = new_engine(models={"m": ModelFacts(stage=stage)}.get)
            principal = new_principal(groups=frozenset({group}))
            decision = engine.decide(principal, action, new_request(), HERE)
            if decision.allowed:
                assert decision.obligations.templates
                assert decision.obligations.max_tokens is not None


def test_scopes_narrow():
    engine = new_engine()
    narrow = new_principal(scopes=frozenset({"model:model:list"}))
    assert not engine.decide(narrow, "model:chat:create", new_request(), HERE).allowed
    assert engine.decide(narrow, "model:model:list", new_request(), HERE).allowed
    assert not engine.decide(new_principal(scopes=frozenset()), "model:model:list", new_request(), HERE).allowed


@pytest.mark.parametrize(
    ("scope", "action", "expected"),
    [
        ("model:*", "model:chat:create", True),
        ("model:chat:*", "model:chat:create", True),
        ("model:chat:create", "model:chat:create", True),
        ("*", "admin:key:create", True),
        ("mod*", "model:chat:create", False),
        ("model:ch*", "model:chat:create", False),
        ("model", "model:chat:create", False),
        ("admin:*", "model:chat:create", False),
    ],
)
def test_what_a_scope_reaches(scope, action, expected):
    assert covers(frozenset({scope}), action) is expected


def test_a_scope_that_reaches_nothing_is_refused():
    assert parse_scope("admin:key:*") == "admin:key:*"
    for wrong in ("", "mod*", "model:nothing:*", "chat"):
        with pytest.raises(ValueError, match="no permission"):
            parse_scope(wrong)


def test_an_unknown_model_is_refused():
    assert not new_engine().decide(new_principal(), "model:chat:create", new_request(model="x"), HERE).allowed


def test_equal_questions_are_asked_once(monkeypatch):
    engine = new_engine()
    asked = []
    ask = engine.current.ask

    def count(_self, question):
        asked.append(question)
        return ask(question)

    monkeypatch.setattr(PolicySet, "ask", count)
    for _ in range(3):
        engine.decide(new_principal(), "model:chat:create", new_request(), HERE)
    # The default set looks at none of these.
    engine.decide(new_principal(), "model:chat:create", new_request(stream=True), Client("10.9.9.9", "other"))
    engine.decide(new_principal(tenant=TenantId("zeta")), "model:chat:create", new_request(), HERE)
    assert len(asked) == 1
    engine.decide(new_principal(), "model:chat:create", new_request(classification="public"), HERE)
    engine.decide(new_principal(groups=frozenset({"ci"})), "model:chat:create", new_request(), HERE)
    engine.decide(new_principal(scopes=frozenset({"*"})), "model:chat:create", new_request(), HERE)
    assert len(asked) == 4


def test_a_model_s_quarantine_takes_its_adapters_with_it_and_no_other_model():
    quarantine = Quarantine()
    models = {"m": ModelFacts(base="base"), "base": ModelFacts(), "other": ModelFacts(base="else")}
    engine = new_engine(quarantine=quarantine, models=models.get)
    quarantine.load([Incident(1, Quarantined.MODEL, "base", "leak", 1.0, "sam")])
    for model, allowed in (("m", False), ("base", False), ("other", True)):
        decision = engine.decide(new_principal(), "model:chat:create", new_request(model=model), HERE)
        assert decision.allowed is allowed, model


def test_models_and_templates_in_quarantine_are_refused():
    quarantine = Quarantine()
    engine = new_engine(quarantine=quarantine)
    assert engine.decide(new_principal(), "model:chat:create", new_request(), HERE).allowed
    for kind, target in ((Quarantined.MODEL, "m"), (Quarantined.TEMPLATE, "secure-coding")):
        quarantine.load([Incident(1, kind, target, "leak", 1.0, "sam")])
        decision = engine.decide(new_principal(), "model:chat:create", new_request(), HERE)
        assert not decision.allowed
        assert "quarantined" in decision.reason
    quarantine.load([])
    assert engine.decide(new_principal(), "model:chat:create", new_request(), HERE).allowed


def test_an_address_that_is_none_is_in_no_network(folder):
    (folder / "b.cedar").write_text(
        '@id("net")\nforbid (principal, action, resource) unless { context.network.isInRange(ip("10.0.0.0/8")) };'
    )
    engine = new_engine(folder)
    for address, expected in (("10.1.2.3", True), ("::ffff:10.1.2.3", True), ("192.168.0.1", False), ("", False)):
        client = Client(address, "x")
        assert engine.decide(new_principal(), "model:chat:create", new_request(), client).allowed is expected


def test_the_hour_is_that_of_the_zone(folder):
    (folder / "b.cedar").write_text(
        '@id("day")\nforbid (principal, action, resource) unless { context.hour >= 8 && context.weekday <= 5 };'
    )
    clock = {"now": 1_800_000_000.0}  # Friday 2027-01-15, 08:00 UTC
    engine = new_engine(folder, clock=lambda: clock["now"])
    assert engine.decide(new_principal(), "model:chat:create", new_request(), HERE).allowed
    clock["now"] -= 1.0
    assert not engine.decide(new_principal(), "model:chat:create", new_request(), HERE).allowed
    clock["now"] += 86401.0
    assert not engine.decide(new_principal(), "model:chat:create", new_request(), HERE).allowed


def test_a_policy_that_fails_refuses_everything(folder):
    (folder / "b.cedar").write_text(
        '@id("overflow")\nforbid (principal, action, resource) when { context.hour * 9223372036854775807 > 1 };'
    )
    question = Question("a", "t", frozenset(), frozenset({"*"}), "api_key", "model:chat:create", "m", num_tokens=4)
    decision = PolicySet.load(folder).ask(question)
    assert not decision.allowed
    assert "could not be evaluated" in decision.reason


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("permit (", "does not parse"),
        ("permit (principal, action, resource);", "needs an id"),
        (GOOD + GOOD, "used twice"),
        (GOOD.replace('@template("secure-coding")\n', ""), "must carry @template"),
        (GOOD.replace('@max_tokens("10")\n', ""), "must carry @max_tokens"),
        (GOOD.replace('@scan_output("block")', '@scan_output("sometimes")'), "must be one of"),
        (GOOD.replace('@max_tokens("10")', '@max_tokens("0")'), "whole number"),
        (GOOD.replace('@max_tokens("10")', '@max_tokens("10")\n@colour("red")'), "unknown annotation @colour"),
        (GOOD.replace("action == ", "action in ").replace('Action::"model:chat:create"', 'Action::"model:chat:make"'),
         "no permission"),
        (GOOD.replace('action == Action::"model:chat:create"', "action"), "must carry @stand_in"),
        (GOOD.replace("resource);", "resource) when { resource.colour };"), "do not fit the schema"),
        (GOOD.replace("principal,", "principal == ?principal,"), "policy template"),
        ('@id("f")\n@max_tokens("1")\nforbid (principal, action, resource);', "a forbid carries only"),
        ("", "hold no policy"),
    ],
)  # fmt: skip
def test_a_bad_set_is_refused_by_name(folder, text, told):
    (folder / "a.cedar").write_text(text)
    with pytest.raises(ConfigError, match=told):
        PolicySet.load(folder)


def test_a_missing_folder_or_schema_is_refused(tmp_path):
    with pytest.raises(ConfigError):
        PolicySet.load(tmp_path)
    shutil.copy(FOLDER / "schema.cedarschema", tmp_path)
    with pytest.raises(ConfigError, match="no policy"):
        PolicySet.load(tmp_path)


def test_a_schema_without_a_permission_is_refused(folder):
    text = (folder / "schema.cedarschema").read_text().replace('"admin:audit:read"', '"admin:audit:look"')
    (folder / "schema.cedarschema").write_text(text)
    with pytest.raises(ConfigError, match="admin:audit:read"):
        PolicySet.load(folder)


def test_reload_takes_a_good_set_and_keeps_the_old_one_from_a_bad(folder):
    engine = new_engine(folder)
    before = engine.current.digest
    (folder / "a.cedar").write_text("permit (")
    with pytest.raises(ConfigError):
        engine.reload()
    assert engine.current.digest == before
    assert engine.decide(new_principal(), "model:chat:create", new_request(), HERE).allowed
    (folder / "a.cedar").write_text(GOOD.replace("principal,", 'principal in Group::"leads",'))
    old, new = engine.reload()
    assert (old, new) == (before, engine.current.digest)
    assert old != new
    assert not engine.decide(new_principal(), "model:chat:create", new_request(), HERE).allowed


def test_the_strictest_of_each_stands(folder):
    (folder / "b.cedar").write_text(
        GOOD.replace('@id("chat")', '@id("chat2")\n@audit_text("yes")\n@tools("b,a")\n@egress_findings("no")')
        .replace('"10"', '"7"')
        .replace('@scan_input("off")', '@scan_input("redact")')
        .replace('"secure-coding"', '"team, secure-coding"')
    )
    decision = new_engine(folder).decide(new_principal(), "model:chat:create", new_request(), HERE)
    demands = decision.obligations
    assert demands.max_tokens == 7
    assert demands.scan_input is ScanMode.REDACT
    assert demands.scan_output is ScanMode.BLOCK
    assert demands.templates == ("secure-coding", "team")
    assert demands.tools_allowed == ("a", "b")
    assert demands.audit_text
    assert not demands.egress_findings


def test_bans_of_all_permits_stand(folder):
    first = GOOD.replace('@id("chat")', '@id("chat")\n@ban_tokens("<think>, eval")')
    (folder / "a.cedar").write_text(first)
    (folder / "b.cedar").write_text(first.replace('"chat"', '"chat2"').replace("<think>", "exec"))
    decision = new_engine(folder).decide(new_principal(), "model:chat:create", new_request(), HERE)
    assert decision.obligations.ban_tokens == ("<think>", "eval", "exec")


@pytest.mark.parametrize("value", ["", "a,,b", "a\\nb", "x" * 65, ",".join(f"w{n}" for n in range(65))])
def test_a_malformed_ban_stops_the_load(folder, value):
    (folder / "a.cedar").write_text(GOOD.replace('@id("chat")', f'@id("chat")\n@ban_tokens("{value}")'))
    with pytest.raises(ConfigError, match="@ban_tokens must list 1 to 64 tokens"):
        PolicySet.load(folder)


@pytest.mark.parametrize(
    ("condition", "reads"),
    [
        ("true", set()),
        ("context.hour > 3", {"hour"}),
        ('context has data && context.data == "public"', {"data"}),
        ('principal.tenant == "acme"', {"tenant"}),
        ('principal == User::"acme/ana"', {"tenant", "subject"}),
        ('[User::"acme/ana"].contains(principal)', {"tenant", "subject"}),
        ('principal in Group::"x" && resource.stage == "live"', {"stage"}),
        (
            'if context.network.isIpv4() then context.client like "a*" else context.stream',
            {"address", "client", "stream"},
        ),
        ("context == context", set(Question._fields) - {"groups", "scopes", "action", "model"}),
    ],
)
def test_what_a_set_looks_at(folder, condition, reads):
    (folder / "a.cedar").write_text(GOOD.replace("resource);", f"resource) when {{ {condition} }};"))
    assert PolicySet.load(folder).reads == reads


def test_every_route_to_a_model_asks_for_a_permission_that_carries_demands():
    for route, fmt in MODEL_ROUTES:
        assert fmt.action in GENERATING, route
        assert FOR_WIRE_FORMAT[fmt.wire_format] == fmt.action, route
