"""Stored responses: kept where policy permits and the caller asks, for their owner alone, encrypted, gone in time."""

import contextlib
import json

import httpx
import openai
import pytest

from benchmarks.gateway.kit import MODEL
from server.audit.texts import TenantKeys
from server.auth.pepper import load_secret
from server.errors import NotFoundError
from server.store.database import Store
from server.store.responses import ResponseStore

CANARY = "the canary question of this test"


@pytest.fixture
def client_of():
    """A factory of SDK clients that are closed when the test ends."""
    with contextlib.ExitStack() as stack:
        yield lambda gateway, key: stack.enter_context(
            openai.OpenAI(base_url=gateway.base + "/v1", api_key=key, max_retries=0)
        )


def ask(gateway, key, **body):
    return httpx.post(
        gateway.base + "/v1/responses",
        json={"model": MODEL, "input": CANARY, "store": True} | body,
        headers={"authorization": f"Bearer {key}"},
        timeout=20,
    )


@pytest.fixture(scope="module")
def other_keys(gateway):
    """Keys of another subject of the tenant, the same name in another tenant, and one with neither read nor delete."""
    keys = {
        "subject": gateway.new_key(groups={"developers"}, subject="other"),
        "tenant": gateway.new_key(groups={"developers"}, tenant="b"),
        "robot": gateway.new_key(groups={"ci"}, subject="robot"),
        "narrow": gateway.new_key(groups={"developers"}, scopes={"model:response:create", "model:model:list"}),
    }
    for key in keys.values():
        gateway.wait_for_key(key)
    return keys


def test_the_sdk_goes_on_from_what_was_kept_and_reads_and_deletes_it(gateway, key, client_of):
    client = client_of(gateway, key)
    first = client.responses.create(model=MODEL, input=CANARY, instructions="Be brief.", store=True)
    assert first.store is True
    again = client.responses.retrieve(first.id)
    assert again.output_text == first.output_text
    assert again.usage == first.usage
    second = client.responses.create(model=MODEL, input="Go on.", previous_response_id=first.id, store=True)
    assert second.previous_response_id == first.id
    items = client.responses.input_items.list(second.id, order="asc").data
    texts = [(item.role, item.content[0].text) for item in items]
    assert texts == [("user", CANARY), ("assistant", first.output_text), ("user", "Go on.")]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    third = client.responses.create(model=MODEL, input="And?", previous_response_id=second.id)
    assert third.store is False  # nobody asked


def test_the_model_is_given_the_whole_conversation_without_old_instructions(gateway, key):
    def tokens(response):
        (accepted,) = [
            entry
            for entry in gateway.entries()
            if entry.get("request_id") == response.headers["x-request-id"]
            and entry["event"] == "gateway:request:accepted"
        ]
        return accepted["prompt"]["tokens"]

    first = ask(gateway, key, instructions="words " * 100)
    answer = first.json()["output"][0]["content"][0]["text"]
    second = ask(gateway, key, input="Go on.", previous_response_id=first.json()["id"])
    whole = [
        {"role": "user", "content": CANARY},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "Go on."},
    ]
    assert tokens(second) == tokens(ask(gateway, key, input=whole, store=False))


def test_a_conversation_keeps_its_data_class_and_is_named_on_record(gateway, key):
    """Without this a conversation that policy was told is internal goes on as if nobody had said so."""

    def accepted(response):
        mine = [entry for entry in gateway.entries() if entry.get("request_id") == response.headers["x-request-id"]]
        return next(entry for entry in mine if entry["event"] == "gateway:request:accepted")

    def go_on(previous, data_class=None):
        headers = {"authorization": f"Bearer {key}"} | ({"x-data-classification": data_class} if data_class else {})
        body = {"model": MODEL, "input": "Go on.", "store": True, "previous_response_id": previous}
        return httpx.post(gateway.base + "/v1/responses", json=body, headers=headers, timeout=20)

    plain = ask(gateway, key).json()["id"]
    marked = go_on(plain, "internal")
    assert accepted(marked)["classification"] == "internal"
    assert accepted(marked)["previous_response"] == plain
    silent = go_on(marked.json()["id"])
    assert accepted(silent)["classification"] == "internal"
    assert accepted(go_on(silent.json()["id"], "internal"))["classification"] == "internal"
    refused = go_on(silent.json()["id"], "public")
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "data_class_mismatch"


def test_a_streamed_answer_is_kept_before_its_end_says_so(gateway, key, client_of):
    client = client_of(gateway, key)
    events = list(client.responses.create(model=MODEL, input=CANARY, store=True, stream=True))
    done = events[-1].response
    assert events[0].response.store is done.store is True
    assert client.responses.retrieve(done.id).output_text == done.output_text


def test_tool_calls_and_their_results_go_on(make_gateway, client_of):
    kit = make_gateway()
    kit.start()
    key = kit.new_key(groups={"developers"})
    kit.wait_for_key(key)
    tool = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
    kit.control(tool_call={"name": "look", "arguments": "{}"})
    client = client_of(kit, key)
    first = client.responses.create(model=MODEL, input=CANARY, tools=[tool], store=True)
    (call,) = first.output
    kit.control()
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    second = client.responses.create(
        model=MODEL, input=[result], tools=[tool], previous_response_id=first.id, store=True
    )
    kinds = [item.type for item in client.responses.input_items.list(second.id, order="asc").data]
    assert kinds == ["message", "function_call", "function_call_output"]


def test_nobody_else_finds_it(gateway, key, other_keys):
    response_id = ask(gateway, key).json()["id"]
    path = f"{gateway.base}/v1/responses/{response_id}"
    for who in ("subject", "tenant"):
        headers = {"authorization": f"Bearer {other_keys[who]}"}
        for method, url in (("GET", path), ("DELETE", path), ("GET", path + "/input_items")):
            response = httpx.request(method, url, headers=headers)
            assert response.status_code == 404, (who, method)
            assert response.json()["error"]["code"] == "response_not_found"
        forked = ask(gateway, other_keys[who], previous_response_id=response_id)
        assert forked.status_code == 404
        assert forked.json()["error"]["code"] == "previous_response_not_found"
        absent = ask(gateway, other_keys[who], previous_response_id="resp_" + "0" * 24)
        assert absent.status_code == 404
        assert absent.json()["error"]["message"].replace("0" * 24, "") == forked.json()["error"]["message"].replace(
            response_id.removeprefix("resp_"), ""
        )
    assert httpx.get(path).status_code == 401
    assert httpx.get(path, headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_policy_says_whose_is_kept_and_who_may_read(gateway, key, other_keys):
    robot = ask(gateway, other_keys["robot"])
    assert robot.status_code == 200
    assert robot.json()["store"] is False
    response_id = ask(gateway, key).json()["id"]
    headers = {"authorization": f"Bearer {other_keys['narrow']}"}
    path = f"{gateway.base}/v1/responses/{response_id}"
    assert httpx.get(path, headers=headers).status_code == 403
    assert httpx.delete(path, headers=headers).status_code == 403
    assert httpx.get(path + "/input_items", headers=headers).status_code == 403
    assert ask(gateway, other_keys["narrow"], previous_response_id=response_id).status_code == 403


def test_each_act_is_on_record_and_no_text_lies_open(gateway, key):
    response_id = ask(gateway, key).json()["id"]
    headers = {"authorization": f"Bearer {key}"}
    httpx.get(f"{gateway.base}/v1/responses/{response_id}", headers=headers)
    httpx.delete(f"{gateway.base}/v1/responses/{response_id}", headers=headers)
    events = [entry["event"] for entry in gateway.entries() if entry.get("response") == response_id]
    assert events == ["gateway:response:stored", "gateway:response:read", "gateway:response:deleted"]
    ask(gateway, key)
    for path in gateway.state.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=²", "limit=x", "order=up", "after=nothing"])
def test_a_wrong_query_is_a_400_by_name(gateway, key, query):
    response_id = ask(gateway, key).json()["id"]
    path = f"{gateway.base}/v1/responses/{response_id}/input_items?{query}"
    response = httpx.get(path, headers={"authorization": f"Bearer {key}"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == query.partition("=")[0]


def test_pages_of_items_join_up(gateway, key, client_of):
    turns = [{"role": "user", "content": f"turn {n}"} for n in range(7)]
    response_id = ask(gateway, key, input=turns).json()["id"]
    client = client_of(gateway, key)
    found = list(client.responses.input_items.list(response_id, order="asc", limit=3))
    assert [item.content[0].text for item in found] == [f"turn {n}" for n in range(7)]


@pytest.fixture
def kept(tmp_path):
    now = [1000.0]
    keys = TenantKeys(tmp_path / "keys", b"k" * 32)
    store = Store.open(f"sqlite:///{tmp_path / 'store.db'}", clock=lambda: now[0])
    yield ResponseStore(store, keys.get, keep_s=100), store, keys, now
    store.close()


def test_it_is_gone_in_time_and_with_the_tenant_s_key(kept):
    responses, _, keys, now = kept
    responses.put("a", "s", "resp_1", {"x": 1})
    responses.put("b", "s", "resp_1", {"x": 2})
    assert responses.get("a", "s", "resp_1") == {"x": 1}
    keys.destroy("b")
    with pytest.raises(NotFoundError):
        responses.get("b", "s", "resp_1")
    now[0] += 100
    with pytest.raises(NotFoundError):
        responses.get("a", "s", "resp_1")


def test_a_row_that_is_moved_in_the_database_does_not_open(kept):
    responses, store, _, _ = kept
    responses.put("a", "s", "resp_1", {"x": 1})
    with store.write() as connection:
        connection.exec_driver_sql("UPDATE responses SET subject = 'thief'")
    with pytest.raises(NotFoundError):
        responses.get("a", "thief", "resp_1")


def test_one_subject_s_room_has_an_end(kept, monkeypatch):
    monkeypatch.setattr("server.store.responses.MAX_PER_SUBJECT", 3)
    responses, _, _, now = kept
    for number in range(5):
        now[0] += 1
        responses.put("a", "s", f"resp_{number}", {"n": number})
    responses.put("a", "other", "resp_0", {"n": 0})
    for number in range(5):
        if number < 2:
            with pytest.raises(NotFoundError):
                responses.get("a", "s", f"resp_{number}")
        else:
            assert json.dumps(responses.get("a", "s", f"resp_{number}"))
    assert responses.get("a", "other", "resp_0") == {"n": 0}


def test_one_subject_s_bytes_have_an_end(kept, monkeypatch):
    monkeypatch.setattr("server.store.responses.MAX_BYTES_PER_SUBJECT", 2_500)
    responses, _, _, now = kept
    responses.put("a", "other", "resp_0", {"text": "y" * 1_000})
    for number in range(4):
        now[0] += 1
        responses.put("a", "s", f"resp_{number}", {"text": "x" * 1_000})
    for number in range(2):
        with pytest.raises(NotFoundError):
            responses.get("a", "s", f"resp_{number}")
    assert len(responses.get("a", "s", "resp_2")["text"]) == len(responses.get("a", "s", "resp_3")["text"]) == 1_000
    assert responses.get("a", "other", "resp_0") == {"text": "y" * 1_000}


@pytest.mark.parametrize("name", ["resp_\ud800", "resp_é", "resp_1\x00", ""])
def test_an_id_that_is_none_is_not_found(kept, name):
    responses, _, _, _ = kept
    responses.put("a", "s", "resp_1", {"n": 1})
    with pytest.raises(NotFoundError):
        responses.get("a", "s", name)
    with pytest.raises(NotFoundError):
        responses.delete("a", "s", name)


def test_the_text_key_of_the_state_opens_what_the_gateway_kept(gateway, key):
    """What the gateway stores is under the same tenant keys as audit texts, so one destruction erases both."""
    response_id = ask(gateway, key).json()["id"]
    secret = load_secret(gateway.settings.keys_dir / "audit-text", "text key")
    keys = TenantKeys(gateway.state / "texts" / "keys", secret)
    store = Store.open(gateway.settings.store_url)
    try:
        record = ResponseStore(store, keys.get, keep_s=1).get("a", "s", response_id)
    finally:
        store.close()
    assert record["messages"][0]["content"] == CANARY
