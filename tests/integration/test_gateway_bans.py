"""Tokens that policy bans go to the engine with every request, whatever the caller sends, and stand in the record."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from benchmarks.gateway.kit import MODEL, tokenizer_files
from server.audit.tags import Event
from server.template.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gateway.kit import GatewayKit

POLICY = Path(__file__).parents[2] / "configs" / "policy"
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16},
}


@pytest.fixture
def kit(make_gateway, tmp_path: Path) -> Iterator[GatewayKit]:
    """A gateway under the default policies, whose developers may not be told `quick`, nor a token no model has."""
    folder = tmp_path / "policy"
    shutil.copytree(POLICY, folder)
    path = folder / "10-developers.cedar"
    text = path.read_text()
    path.write_text(text.replace("@max_tokens", '@ban_tokens("quick")\n@max_tokens'))
    path = folder / "30-ci.cedar"
    path.write_text(path.read_text().replace("@max_tokens", '@ban_tokens("<|no-such|>")\n@max_tokens'))
    with make_gateway(policy={"directory": str(folder)}) as kit:
        yield kit


def post(kit: GatewayKit, route: str, key: str, **more: Any) -> httpx.Response:
    body = {"model": MODEL, **BODIES[route], **more}
    return httpx.post(kit.base + route, json=body, headers={"authorization": f"Bearer {key}"}, timeout=30)


def test_bans_reach_the_engine_on_every_route_and_no_caller_lifts_them(kit: GatewayKit) -> None:
    files = tokenizer_files()
    vocabulary = Vocabulary(files["tokenizer.json"], json.loads(files["tokenizer_config.json"]))
    banned = sorted(vocabulary.ids_of_word("quick"))
    assert banned
    key = kit.working_key(groups={"developers"})
    for route in BODIES:
        assert post(kit, route, key).status_code == 200, route
        assert kit.stats()["last_body"]["vllm_xargs"] == {"strongroom_banned_tokens": banned}, route
        accepted = [entry for entry in kit.entries() if entry["event"] == Event.REQUEST_ACCEPTED][-1]
        assert accepted["obligations"]["ban_tokens"] == ["quick"]
        assert accepted["banned_tokens"] == banned
    finished = kit.stats()["finished"]
    lifts: list[dict[str, list[int]]] = [{"strongroom_banned_tokens": []}, {"strongroom_banned_tokens": [1, 2]}]
    for lifted in lifts:
        answer = post(kit, "/v1/chat/completions", key, vllm_xargs=lifted)
        assert answer.status_code == 400, answer.text
    assert kit.stats()["finished"] == finished
    # Under another name they are unknown fields: dropped, and the ban stands.
    assert post(kit, "/v1/chat/completions", key, extra_args={"strongroom_banned_tokens": []}).status_code == 200
    last = kit.stats()["last_body"]
    assert last["vllm_xargs"] == {"strongroom_banned_tokens": banned}
    assert "extra_args" not in last


def test_a_ban_that_can_not_hold_refuses_the_request_and_says_so_on_record(kit: GatewayKit) -> None:
    key = kit.working_key(groups={"ci"})
    finished = kit.stats()["finished"]
    answer = post(kit, "/v1/chat/completions", key)
    assert answer.status_code == 500
    assert kit.stats()["finished"] == finished
    refused = [entry for entry in kit.entries() if entry["event"] == Event.REQUEST_REFUSED][-1]
    assert refused["code"] == "config_invalid"
    kit.control(bans=False)
    answer = post(kit, "/v1/chat/completions", kit.working_key(groups={"developers"}))
    assert answer.status_code == 500
    last = [entry for entry in kit.entries() if entry["event"] == Event.REQUEST_FINISHED][-1]
    assert (last["outcome"], last["code"]) == ("failed", "config_invalid")
