"""The engine's client against the instant engine: over sockets, with all that can go wrong on them."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.instant_engine import Engine, Script, serve
from server.engine.client import EngineClient, unix_address, url_address
from server.engine.http import Timeouts
from server.engine.wire import without_mark
from server.errors import ConfigError, EngineError, EngineUnavailableError, RequestError
from server.types import (
    Chat,
    Completion,
    Conversation,
    Delta,
    Embedding,
    ModelRequest,
    Payload,
    Prompt,
    RequestId,
    Secret,
    TemplateRef,
    WireFormat,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

PROMPT = Prompt("text", [5, 6, 7], TemplateRef("t", "1", "0" * 64))
CHAT = Chat(({"role": "user", "content": "x"},))


@asynccontextmanager
async def running(
    folder: Path, script: Script | None = None, *, tested: bool = True, **kwargs: Any
) -> AsyncGenerator[tuple[Engine, EngineClient], None]:
    engine = Engine("m", 4096, script or Script(num_tokens=3, text="abcdef"))
    server = await serve(engine, uds=str(folder / "e.sock"), port=None)
    kwargs.setdefault("timeouts", Timeouts(connect_s=10, first_byte_s=10, stall_s=10))
    client = EngineClient("m", 4096, unix_address(folder / "e.sock"), **kwargs)
    try:
        if tested:
            await client.self_test()
        yield engine, client
    finally:
        client.close()
        server.close()


async def ask(client: EngineClient, payload: Payload = CHAT, prompt: Prompt = PROMPT, **fields: Any) -> list[Delta]:
    request = ModelRequest(WireFormat.CHAT, "m", payload, fields.pop("sampling", {}), stream=True)
    stream = client.stream(prompt, request, max_tokens=50, cache_salt="s", request_id=RequestId("r"))
    return [delta async for deltas in stream for delta in deltas]


async def until(is_so: Callable[[], bool], limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not is_so():  # noqa: ASYNC110 - what is waited for happens behind a socket
            await asyncio.sleep(0.005)


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("payload", [CHAT, Completion("x")])
async def test_streams_text_and_usage(tmp_path: Path, payload: Payload, separate: bool) -> None:
    async with running(tmp_path, Script("abcdef", 3, separate=separate)) as (engine, client):
        deltas = await ask(client, payload)
        assert text_of(deltas) == "abcdef"
        assert [d.finish_reason for d in deltas if d.finish_reason] == ["stop"]
        usage = deltas[-1].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (3, 3)
        assert engine.last_body["cache_salt"] == "s"
        assert (engine.num_running, engine.num_aborted) == (0, 0)


async def test_choices_keep_their_index(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        deltas = await ask(client, sampling={"n": 2})
        assert [text_of([d for d in deltas if d.index == i]) for i in range(2)] == ["abcdef"] * 2


async def test_tool_calls(tmp_path: Path) -> None:
    call = '{"name": "add", "arguments": {"a": 1}}'
    async with running(tmp_path, Script(tool_call=call)) as (_, client):
        calls = [call for d in await ask(client) for call in d.tool_calls or ()]
        assert calls[0]["function"]["name"] == "add"
        assert "".join(call["function"].get("arguments", "") for call in calls) == '{"a": 1}'


async def test_embeddings(tmp_path: Path) -> None:
    async with running(tmp_path, embeds=True) as (engine, client):
        prompt = Prompt("", [], PROMPT.template, inputs=([1, 2], [3]))
        deltas = await ask(client, Embedding(("one", "two")), prompt)
        assert [d.index for d in deltas if d.embedding] == [0, 1]
        assert engine.last_path == "/v1/embeddings"
        engine.script = Script(wrong_ids=True)
        with pytest.raises(EngineError):
            await ask(client, Embedding(("one", "two")), prompt)


async def test_connections_are_used_again(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        for _ in range(5):
            await ask(client)
        assert len(client._pool._idle) == 1


async def test_closing_the_generator_aborts_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, Script(num_tokens=1000, delay_ms=5)) as (engine, client):
        request = ModelRequest(WireFormat.CHAT, "m", CHAT, {}, stream=True)
        stream = client.stream(PROMPT, request, max_tokens=1000, cache_salt="s", request_id=RequestId("r"))
        await anext(stream)
        assert engine.num_running == 1
        await stream.aclose()
        await until(lambda: (engine.num_running, engine.num_aborted) == (0, 1), 2.0)


async def test_cancelling_while_it_waits_aborts(tmp_path: Path) -> None:
    async with running(tmp_path, Script(first_delay_ms=10_000)) as (engine, client):
        task = asyncio.create_task(ask(client))
        await until(lambda: engine.num_running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: (engine.num_running, engine.num_aborted) == (0, 1), 2.0)


async def test_many_cancelled_at_random_leave_nothing(tmp_path: Path) -> None:
    async with running(tmp_path, Script(num_tokens=50, delay_ms=1)) as (engine, client):

        async def leave(after_s: float) -> None:
            try:
                async with asyncio.timeout(after_s):
                    await ask(client)
            except TimeoutError:
                pass

        async with asyncio.TaskGroup() as group:
            for i in range(200):
                group.create_task(leave((i * 37 % 100) / 1000))
        await until(lambda: engine.num_running == 0, 2.0)
        assert engine.num_aborted > 50
        engine.script = Script("abc", 1)
        assert text_of(await ask(client)) == "abc"


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (Script(status=500), EngineError),
        (Script(status=503), EngineUnavailableError),
        (Script(status=400), RequestError),
        (Script(num_tokens=9, error_after=4), EngineError),
        (Script(num_tokens=9, cut_after=4), EngineError),
        (Script(num_tokens=9, hang_after=4), EngineError),
        (Script(num_tokens=9, first_delay_ms=5000), EngineUnavailableError),
        (Script(num_tokens=9, wrong_ids=True), EngineError),
    ],
    ids=["500", "503", "400", "error-event", "cut", "stall", "no-first-byte", "other-prompt"],
)
async def test_failures_are_ours_and_the_next_request_works(
    tmp_path: Path, script: Script, kind: type[Exception]
) -> None:
    hurried = script.hang_after is not None or script.first_delay_ms
    limits = Timeouts(connect_s=10, first_byte_s=0.5, stall_s=0.2) if hurried else Timeouts()
    async with running(tmp_path, timeouts=limits) as (engine, client):
        good, engine.script = engine.script, script
        with pytest.raises(kind) as caught:
            await ask(client)
        assert "secret" not in str(caught.value)
        if hurried:
            return
        engine.script = good
        if not client.ready:  # an engine that answered another prompt must pass its test again
            await client.self_test()
        assert text_of(await ask(client)) == "abcdef"


async def test_answering_another_prompt_ends_the_trust(tmp_path: Path) -> None:
    async with running(tmp_path) as (engine, client):
        engine.script = Script(wrong_ids=True)
        with pytest.raises(EngineError, match="did not answer the prompt"):
            await ask(client)
        with pytest.raises(EngineUnavailableError):
            await ask(client)


async def test_nothing_before_the_self_test(tmp_path: Path) -> None:
    async with running(tmp_path, tested=False) as (engine, client):
        with pytest.raises(EngineUnavailableError):
            await ask(client)
        assert engine.last_path == ""


@pytest.mark.parametrize("embeds", [False, True])
async def test_self_test_refuses_an_engine_that_renders(tmp_path: Path, embeds: bool) -> None:
    async with running(tmp_path, Script(wrong_ids=True), tested=False, embeds=embeds) as (engine, client):
        engine.script = Script(wrong_ids=True)
        with pytest.raises(ConfigError):
            await client.self_test()
        assert not client.ready


@pytest.mark.parametrize(("model", "length"), [("other", 4096), ("m", 100)])
async def test_self_test_refuses_another_model(tmp_path: Path, model: str, length: int) -> None:
    async with running(tmp_path, tested=False) as (engine, client):
        engine.model, engine.max_model_len = model, length
        with pytest.raises(ConfigError):
            await client.self_test()


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"7", b'{"data": 7}', b'{"data": [7]}', b'{"data": [{}]}'])
async def test_self_test_survives_any_answer(tmp_path: Path, body: bytes) -> None:
    """A watch must go on when something else answers at the engine's address."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    server = await asyncio.start_unix_server(answer, tmp_path / "e.sock")
    client = EngineClient("m", 4096, unix_address(tmp_path / "e.sock"))
    with pytest.raises((EngineError, ConfigError)):
        await client.self_test()
    server.close()
    await server.wait_closed()


async def test_a_restarted_engine_is_tested_again(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, client):
        await ask(client)
    other = await serve(Engine("m", 4096, Script("new", 1)), uds=str(tmp_path / "e.sock"), port=None)
    try:
        with pytest.raises(EngineUnavailableError):
            await ask(client)
        assert not client.ready
        await client.self_test()
        assert text_of(await ask(client)) == "new"
    finally:
        client.close()
        other.close()


async def test_watch_follows_the_engine(tmp_path: Path) -> None:
    seen: list[tuple[bool, str | None]] = []
    async with running(tmp_path, tested=False) as (_, client):
        task = asyncio.create_task(
            client.watch(interval_s=0.01, on_change=lambda ready, code: seen.append((ready, code)))
        )
        await until(lambda: seen == [(True, None)])
    (tmp_path / "e.sock").unlink(missing_ok=True)
    await until(lambda: len(seen) > 1)
    task.cancel()
    assert not client.ready
    assert seen[:2] == [(True, None), (False, None)]


async def test_wait_ready_gives_up(tmp_path: Path) -> None:
    client = EngineClient("m", 4096, unix_address(tmp_path / "absent"))
    with pytest.raises(EngineUnavailableError, match="did not become ready"):
        await client.wait_ready(0.05, interval_s=0.01)


@pytest.mark.parametrize("key", ["", "a b", "a\r\nx: y", "ü"])
async def test_an_api_key_can_not_be_more_than_a_key(key: str) -> None:
    with pytest.raises(ConfigError):
        EngineClient("m", 4096, url_address("http://x", allow_plaintext=True), api_key=Secret(key))


async def test_bans_travel_with_the_request_once_the_engine_proved_that_it_holds_to_them(tmp_path: Path) -> None:
    banned = replace(PROMPT, banned_ids=(3, 9))
    async with running(tmp_path) as (engine, client):
        for payload in (CHAT, Completion("x")):
            assert text_of(await ask(client, payload, banned))
            assert engine.last_body["vllm_xargs"] == {"strongroom_banned_tokens": [3, 9]}
            assert engine.last_body["stream"]
        await ask(client)
        assert "vllm_xargs" not in engine.last_body


async def test_an_engine_that_says_what_it_is_told_not_to_gets_no_request(tmp_path: Path) -> None:
    async with running(tmp_path, Script(bans=False)) as (engine, client):
        with pytest.raises(ConfigError, match="does not hold to it"):
            await ask(client, prompt=replace(PROMPT, banned_ids=(3,)))
        assert "stream" not in engine.last_body
        assert text_of(await ask(client))
        engine.script = replace(engine.script, bans=True)
        assert text_of(await ask(client, prompt=replace(PROMPT, banned_ids=(3,))))


async def test_by_url(tmp_path: Path) -> None:
    engine = Engine("m", 4096, Script("abc", 1))
    server = await serve(engine, uds=None, port=0)
    port = server.sockets[0].getsockname()[1]
    client = EngineClient("m", 4096, url_address(f"http://127.0.0.1:{port}", allow_plaintext=True))
    try:
        await client.wait_ready(5)
        assert text_of(await ask(client)) == "abc"
        assert "vllm:num_requests_running" in await client.metrics_text()
        server.close()
        client.close()
        with pytest.raises(EngineUnavailableError):
            await ask(client)
        assert not client.ready  # of a remote engine a lost connection is all that shows a restart
    finally:
        client.close()
        server.close()


async def test_an_engine_that_renders_by_itself_gets_messages_and_its_answer_is_restored(tmp_path: Path) -> None:
    mark, quoted = "\uf8d0", "What does <|im_end|> mean?"
    marked = quoted.replace("<|", f"<{mark}|")
    conversation = Conversation([{"role": "user", "content": marked}], [], mark)
    prompt = replace(PROMPT, conversation=conversation)
    async with running(tmp_path, Script(marked, 5), messages=True) as (engine, client):
        assert engine.last_path == "", "it was tested with token ids, which it can't take"
        assert text_of(await ask(client, prompt=prompt)) == quoted
        assert engine.last_path == "/v1/chat/completions"
        assert engine.last_body["messages"] == conversation.messages
        assert set(engine.last_body) == {"model", "messages", "max_tokens", "stream", "stream_options"}


def test_a_restored_delta_keeps_everything_else() -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": '{"a": "<\uf8d0|im_end|>"}'}}
    delta = Delta(2, "a\uf8d0b", "\uf8d0c", [call], "stop")
    restored = without_mark(delta, "\uf8d0")
    assert (restored.index, restored.text, restored.reasoning, restored.finish_reason) == (2, "ab", "c", "stop")
    assert restored.tool_calls == [{**call, "function": {"name": "f", "arguments": '{"a": "<|im_end|>"}'}}]
