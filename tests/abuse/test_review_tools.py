"""A permit that names tools permits no others."""

from __future__ import annotations

import shutil

import pytest

from server.policy.engine import ModelFacts, PolicyEngine
from server.types import Chat, Client, ModelRequest, Principal, SubjectId, TenantId, WireFormat


def tool(name="f", **parameters):
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def chat_of(*tools, messages=({"role": "user", "content": "x"},)):
    return ModelRequest(WireFormat.CHAT, "m", Chat(messages, tools), {})


@pytest.fixture
def policy(tmp_path):
    shutil.copy("configs/policy/schema.cedarschema", tmp_path)
    (tmp_path / "10.cedar").write_text(
        '@id("chat")\n@template("t")\n@scan_input("off")\n@scan_output("off")\n@max_tokens("9")\n@tools("good")\n'
        'permit (principal, action in [Action::"model:chat:create", Action::"model:message:create", '
        'Action::"model:response:create"], resource);'
    )
    return PolicyEngine.load(tmp_path, models={"m": ModelFacts()}.get)


@pytest.mark.parametrize("action", ["model:chat:create", "model:message:create", "model:response:create"])
def test_a_tool_that_policy_does_not_name_is_refused(policy, action):
    who = Principal(SubjectId("s"), TenantId("t"), frozenset(), frozenset({"*"}), "api_key", "k")
    here = Client("127.0.0.1", "")
    assert policy.decide(who, action, chat_of(), here).allowed
    assert policy.decide(who, action, chat_of(tool("good")), here).allowed
    refused = policy.decide(who, action, chat_of(tool("good"), tool("bad")), here)
    assert not refused.allowed
    assert refused.reason == "policy allows no tools but good in this request"
