"""Policies that are of no use are found, and none of use is blamed; the command says so."""

import json
import shutil
from pathlib import Path

import pytest

from server.cli import main
from server.policy.cedar import PolicySet
from server.policy.review import find_idle

FOLDER = Path("configs/policy")
DEMANDS = '@template("t")\n@scan_input("off")\n@scan_output("off")\n@max_tokens("1")\n'


@pytest.fixture
def folder(tmp_path):
    shutil.copy(FOLDER / "schema.cedarschema", tmp_path)
    return tmp_path


def idle_of(folder, text):
    (folder / "a.cedar").write_text(text)
    return {one.rule_id: one.problem for one in find_idle(PolicySet.load(folder))}


def permit(rule_id, condition="true", scope="principal"):
    return f"""@id("{rule_id}")\n{DEMANDS}permit ({scope}, action == Action::"model:chat:create", resource)
               when {{ {condition} }};\n"""


def test_every_policy_of_the_default_set_is_of_use():
    assert find_idle(PolicySet.load(FOLDER)) == []


@pytest.mark.parametrize(
    "condition",
    [
        'resource.stage == "live"',
        "context.hour >= 22 || context.hour < 6",
        'context.network.isInRange(ip("192.168.7.0/24"))',
        'context.client like "tabby*"',
        'principal.scopes.contains("model:chat:create")',
        'principal in Group::"night-shift"',
        'principal.tenant == "acme" && resource == Model::"house-coder" && context.data == "restricted"',
        "context.tokens > 100000 && context.stream",
        'principal == User::"acme/ana"',
        "context.weekday > 5",
        'resource.licence == "apache-2.0" && principal.method == "mtls"',
    ],
)
def test_a_permit_with_a_condition_is_of_use(folder, condition):
    assert idle_of(folder, permit("one", condition)) == {}


@pytest.mark.parametrize(
    "condition",
    [
        'resource.stage == "live" && resource.stage == "retired"',
        "context.hour > 23",
        "context.hour < 3 && context.hour > 5",
    ],
)
def test_a_permit_that_nothing_reaches_is_found(folder, condition):
    assert "no request" in idle_of(folder, permit("ok") + permit("dead", condition))["dead"]


def test_a_permit_that_a_forbid_covers_is_found(folder):
    text = permit("night", "context.hour < 6") + permit("day", "context.hour >= 6")
    found = idle_of(folder, text + '@id("no-nights")\nforbid (principal, action, resource) when { context.hour < 6 };')
    assert list(found) == ["night"]
    assert "forbid refuses" in found["night"]


def test_a_forbid_that_never_bites_is_found(folder):
    text = permit("day", "context.hour >= 6")
    found = idle_of(folder, text + '@id("no-nights")\nforbid (principal, action, resource) when { context.hour < 6 };')
    assert list(found) == ["no-nights"]
    assert "anyway" in found["no-nights"]


def test_check_ends_with_one_when_something_is_amiss(folder, capsys):
    (folder / "a.cedar").write_text(permit("dead", "context.hour > 23"))
    assert main(["policy", "check", "--dir", str(folder)]) == 1
    assert "dead: no request" in capsys.readouterr().out
    assert main(["policy", "check", "--dir", str(FOLDER), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["problems"] == []
    assert {"developers-chat", "restricted-data"} <= {one["policy"] for one in answer["policies"]}


def test_test_runs_the_cases(folder, capsys):
    assert main(["policy", "test"]) == 0
    num_cases = Path("configs/policy/cases.yaml").read_text().count("  - name: ")
    assert f"{num_cases} of {num_cases} cases hold" in capsys.readouterr().out
    cases = folder / "cases.yaml"
    cases.write_text("cases: [{name: turned, groups: [developers], action: model:chat:create, expect: allow}]")
    (folder / "a.cedar").write_text(permit("none", scope='principal in Group::"leads"'))
    assert main(["policy", "test", "--dir", str(folder)]) == 1
    assert "turned: expected to be allowed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        "", "cases: []", "cases: [3]", "colour: red", "cases: [{name: a, expect: maybe}]", "[",
        "cases: [{name: a, expect: deny, action: chat}]", "cases: [{name: a, expect: deny, groups: all}]",
        "cases: [{name: a, expect: deny, action: model:chat:create, hour: noon}]",
        "cases: [{name: a, expect: deny, action: model:chat:create, colour: red}]",
    ],
)  # fmt: skip
def test_bad_cases_are_refused(folder, capsys, text):
    (folder / "a.cedar").write_text(permit("one"))
    (folder / "cases.yaml").write_text(text)
    assert main(["policy", "test", "--dir", str(folder)]) == 1
    assert "strongroom:" in capsys.readouterr().err


def test_why_names_policy_file_and_demands(capsys):
    asked = ["policy", "why", "--group", "ci", "--action", "model:chat:create", "--model", "m", "--json"]
    assert main(asked) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["allowed"]
    assert [one["policy"] for one in answer["policies"]] == ["ci-chat"]
    assert answer["demands"]["scan_output"] == "block"
    assert main([*asked[:-1], "--data", "restricted"]) == 0
    assert "refused: forbidden by restricted-data" in capsys.readouterr().out
    assert main([*asked, "--scope", "model:model:list"]) == 0
    assert "scopes" in json.loads(capsys.readouterr().out)["reason"]
