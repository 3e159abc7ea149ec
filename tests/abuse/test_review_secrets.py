"""Ways to get a secret past the scanner."""

from __future__ import annotations

import pytest

from server.errors import ContentBlockedError
from server.guard.guard import Guard
from server.guard.release import Choice
from server.types import Chat, Delta, ModelRequest, Obligations, ScanMode, WireFormat

SECRET = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"


def tool(name="f", **parameters):
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


def chat_of(*tools, messages=({"role": "user", "content": "x"},)):
    return ModelRequest(WireFormat.CHAT, "m", Chat(messages, tools), {})


@pytest.mark.parametrize("name", ["id", "type", "role", "tool_call_id"])
async def test_a_secret_under_a_name_of_ours_is_scanned(name):
    guard = Guard(num_workers=1)
    hidden = chat_of(tool(properties={name: {"description": SECRET}}))
    with pytest.raises(ContentBlockedError):
        await guard.admit(hidden, Obligations(scan_input=ScanMode.BLOCK))
    redacted, _ = await guard.admit(hidden, Obligations(scan_input=ScanMode.REDACT))
    assert SECRET not in str(redacted.payload)


async def test_a_secret_in_the_name_of_a_field_is_scanned():
    with pytest.raises(ContentBlockedError):
        await Guard(num_workers=1).admit(chat_of(tool(properties={SECRET: {}})), Obligations(scan_input=ScanMode.BLOCK))


async def test_log_probabilities_do_not_spell_what_was_redacted():
    async def clean(_source, _label):
        return (), None

    choice = Choice(0, chat_of(), ScanMode.REDACT)
    # With stop strings the engine holds text back, but not the log-probabilities of the tokens that spell it.
    choice.push([Delta(0, "", logprobs={"content": [{"token": SECRET}]}), Delta(0, f"it is {SECRET} ")])
    await choice.settle(clean, None)
    out = choice.take()
    choice.push([Delta(0, "so.", logprobs={"content": [{"token": "so"}]}), Delta(0, finish_reason="stop")])
    await choice.finish(clean, None)
    out += choice.take()
    assert SECRET not in str(out)
    assert "so." in "".join(delta.text for delta in out)
