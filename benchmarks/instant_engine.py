"""An engine that answers at once: vLLM's HTTP contract with made-up text, to measure and test what stands before it.

    python -m benchmarks.instant_engine --uds /run/x/engine.sock --model m --num-tokens 64
    python -m benchmarks.instant_engine --port 8001 --text "def f(): pass" --delay-ms 5 --separate

It is written against `asyncio.Protocol`, with streams built beforehand, so that it is never the limit. A test overrides
any setting for one request in the header `x-instant-engine`, as JSON: `{"text": …, "num_tokens": …, "delay_ms": …,
"separate": …, "status": 500, "error_after": 3, "cut_after": 3, "hang_after": 3, "tool_call": {"name": …,
"arguments": …}, "tool_call_times": 1}`. Because gateways pass no such header on, the same JSON can be put there for all
requests by `POST /control`. `GET /stats` says what ran, what was aborted and what the last body was.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import signal
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import httptools
import orjson
import uvloop
from typing_extensions import override

PROSE = "Here is what I would do: keep the function small, check its input first, and write a test for each branch. "


@dataclass(frozen=True)
class Script:
    """How to answer."""

    text: str = PROSE
    num_tokens: int = 64
    delay_ms: float = 0.0
    separate: bool = False
    status: int = 200
    error_after: int | None = None
    cut_after: int | None = None
    hang_after: int | None = None
    tool_call: str | None = None
    tool_call_times: int | None = None  # so many requests with tools get the call, all others the text
    tool_finish_reason: str = "tool_calls"
    finish_reason: str = "stop"
    stop_reason: str | None = None
    first_delay_ms: float = 0.0
    wrong_ids: bool = False
    bans: bool = True  # whether it leaves banned tokens out
    interval: int = 1
    echo: bool = False

    @classmethod
    def parse(cls, raw: bytes | dict[str, Any], base: Script) -> Script:
        """`base` with the given fields replaced; unknown ones are an error."""
        given = orjson.loads(raw) if isinstance(raw, bytes) else raw
        if isinstance(given.get("tool_call"), dict):
            given["tool_call"] = json.dumps(given["tool_call"])
        unknown = set(given) - {f.name for f in fields(cls)}
        if unknown:
            message = f"unknown fields {sorted(unknown)}"
            raise ValueError(message)
        return replace(base, **given)


@lru_cache(maxsize=256)
def pieces(script: Script) -> tuple[str, ...]:
    """The text, cut into `num_tokens` pieces of four characters; repeated where it is too short."""
    if script.text != PROSE:  # a text that a test asked for is sent whole, in as many pieces
        size = max(1, -(-len(script.text) // max(1, script.num_tokens)))
        return tuple(script.text[at : at + size] for at in range(0, len(script.text), size))
    text = script.text * (script.num_tokens * 4 // len(script.text) + 1)
    return tuple(text[at * 4 : at * 4 + 4] for at in range(script.num_tokens))


def stopped(script: Script, stops: list[str]) -> Script:
    """The script with its text cut in front of the first stop string that it has."""
    text = "".join(pieces(script))
    first, stop = min(((text.find(stop), stop) for stop in stops if stop in text), default=(0, None))
    if stop is None:
        return script
    return replace(script, text=text[:first], finish_reason="stop", stop_reason=stop)


def _event(obj: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(obj) + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@lru_cache(maxsize=256)
def stream_events(script: Script, model: str, *, chat: bool, num_choices: int) -> tuple[bytes, ...]:
    """The events of a stream but for the usage."""
    head = {
        "id": "chatcmpl-0" if chat else "cmpl-0",
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": 0,
        "model": model,
    }

    def choice(index: int, delta: dict[str, Any], text: str, finish: str | None = None) -> bytes:
        part = {"delta": delta} if chat else {"text": text}
        body = {"index": index, **part, "logprobs": None, "finish_reason": finish}
        if finish is not None:
            body["stop_reason"] = script.stop_reason
        return _event({**head, "choices": [body]})

    events = [choice(i, {"role": "assistant", "content": ""}, "") for i in range(num_choices)] if chat else []
    if script.tool_call is not None and chat:
        call = json.loads(script.tool_call)
        arguments = call["arguments"] if isinstance(call["arguments"], str) else json.dumps(call["arguments"])
        first = {"index": 0, "id": "chatcmpl-tool-0", "type": "function"}
        first["function"] = {"name": call["name"], "arguments": ""}
        events.append(choice(0, {"tool_calls": [first]}, ""))
        events += [
            choice(0, {"tool_calls": [{"index": 0, "function": {"arguments": arguments[at : at + 5]}}]}, "")
            for at in range(0, len(arguments), 5)
        ]
        return (*events, choice(0, {"content": ""}, "", script.tool_finish_reason))
    cut = pieces(script)
    for piece in ("".join(cut[at : at + script.interval]) for at in range(0, len(cut), script.interval)):
        events += [choice(i, {"content": piece}, piece) for i in range(num_choices)]
    return (*events, *(choice(i, {"content": ""}, "", script.finish_reason) for i in range(num_choices)))


class Engine:
    """What all connections share."""

    def __init__(self, model: str, max_model_len: int, script: Script, dims: int = 384) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.script = script
        self.dims = dims
        self.num_running = 0
        self.num_finished = 0
        self.num_aborted = 0
        self.num_tokens = 0
        self.adapters: list[str] = []
        self.num_tool_calls = 0
        self.last_path = ""
        self.last_body: dict[str, Any] = {}

    def stats(self) -> dict[str, Any]:
        """What `/stats` says."""
        return {
            "running": self.num_running,
            "finished": self.num_finished,
            "aborted": self.num_aborted,
            "tokens": self.num_tokens,
            "last_path": self.last_path,
            "last_body": self.last_body,
        }

    def metrics(self) -> bytes:
        """What `/metrics` says, by vLLM's names."""
        return (
            "# TYPE vllm:num_requests_running gauge\n"
            f'vllm:num_requests_running{{model_name="{self.model}"}} {self.num_running}\n'
            "# TYPE vllm:generation_tokens_total counter\n"
            f'vllm:generation_tokens_total{{model_name="{self.model}"}} {self.num_tokens}\n'
        ).encode()


class Connection(asyncio.Protocol):
    """One caller."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.parser = httptools.HttpRequestParser(self)
        self.task: asyncio.Task[None] | None = None
        self.running = False

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self.task is not None:
            self.task.cancel()
        if self.running:
            self.running = False
            self.engine.num_running -= 1
            self.engine.num_aborted += 1

    @override
    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.close()

    def on_message_begin(self) -> None:
        self.path = b""
        self.body: list[bytes] = []
        self.control: bytes | None = None

    def on_url(self, url: bytes) -> None:
        self.path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"x-instant-engine":
            self.control = value

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        engine = self.engine
        path = self.path.decode()
        if path == "/health":
            self._reply(b"")
        elif path == "/metrics":
            self._reply(engine.metrics(), b"text/plain; version=0.0.4")
        elif path == "/stats":
            self._json(engine.stats())
        elif path == "/control":
            engine.script = Script.parse(b"".join(self.body), engine.script)
            engine.num_tool_calls = 0
            self._json({})
        elif path == "/v1/models":
            names = [(engine.model, engine.max_model_len), *((name, None) for name in engine.adapters)]
            common = {"object": "model", "root": "/x"}
            entries = [{"id": name, "max_model_len": length, **common} for name, length in names]
            self._json({"object": "list", "data": entries})
        elif path in {"/v1/chat/completions", "/v1/completions", "/v1/embeddings"}:
            script = engine.script if self.control is None else Script.parse(self.control, engine.script)
            body = orjson.loads(b"".join(self.body))
            engine.last_path, engine.last_body = path, body
            if script.status != 200:
                error = {"message": "made-up failure: secret detail /usr/lib/x.py", "type": "X", "code": script.status}
                self._json({"error": error}, script.status)
            elif path == "/v1/embeddings":
                self._embed(script, body)
            else:
                self._answer(script, body, chat=path == "/v1/chat/completions")
        else:
            self._json({"detail": "Not Found"}, 404)

    def _reply(self, body: bytes, kind: bytes = b"application/json", status: int = 200) -> None:
        self.transport.write(
            b"HTTP/1.1 %d X\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (status, kind, len(body), body)
        )

    def _json(self, obj: dict[str, Any], status: int = 200) -> None:
        self._reply(orjson.dumps(obj), status=status)

    def _embed(self, script: Script, body: dict[str, Any]) -> None:
        given = body["input"]
        texts = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
        num_tokens = (
            sum(len(text) if isinstance(text, list) else len(text.split()) for text in texts) + script.wrong_ids
        )
        vectors = [
            {"object": "embedding", "index": i, "embedding": [1.0] + [0.0] * (self.engine.dims - 1)}
            for i in range(len(texts))
        ]
        self._json({"object": "list", "data": vectors, "usage": {"prompt_tokens": num_tokens}})
        self.engine.num_finished += 1

    def _answer(self, script: Script, body: dict[str, Any], *, chat: bool) -> None:
        ids = (body.get("kv_transfer_params") or {}).get("prompt_token_ids") if chat else body.get("prompt")
        num_prompt_tokens = len(ids) if isinstance(ids, list) else 1
        if script.echo:  # words that tell one prompt from every other
            script = replace(script, text=f"answer {hashlib.sha256(orjson.dumps(ids)).hexdigest()}", num_tokens=9)
        num_choices = body.get("n") or 1
        limit = body.get("max_completion_tokens" if chat else "max_tokens")
        if limit is not None and limit < script.num_tokens:
            script = replace(script, num_tokens=limit, finish_reason="length")
        if body.get("stop"):
            script = stopped(script, body["stop"])
        num_tokens = len(pieces(script)) * num_choices
        if script.tool_call_times is not None:
            if not body.get("tools") or self.engine.num_tool_calls >= script.tool_call_times:
                script = replace(script, tool_call=None)
            else:
                self.engine.num_tool_calls += 1
        usage = {
            "prompt_tokens": num_prompt_tokens + (1 if script.wrong_ids else 0),
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt_tokens + num_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        engine = self.engine
        engine.num_tokens += num_tokens
        if not body.get("stream"):
            self._plain(script, body, ids, usage, chat=chat)
            return
        # vLLM's own field: so many tokens in one event, for callers who don't watch them come.
        script = replace(script, interval=max(1, int(body.get("stream_interval") or 1)))
        events = stream_events(script, engine.model, chat=chat, num_choices=num_choices)
        tail = _event({"id": "x", "object": "x", "created": 0, "model": engine.model, "choices": [], "usage": usage})
        tail += b"data: [DONE]\n\n"
        faults = (script.error_after, script.cut_after, script.hang_after)
        if script.delay_ms or script.first_delay_ms or script.separate or any(fault is not None for fault in faults):
            self.running = True
            engine.num_running += 1
            self.task = asyncio.create_task(self._slow(script, events, tail))
            return
        self.transport.write(_HEAD + _whole(events) + _chunk(tail) + b"0\r\n\r\n")
        engine.num_finished += 1

    async def _slow(self, script: Script, events: tuple[bytes, ...], tail: bytes) -> None:
        write = self.transport.write
        if script.first_delay_ms:
            await asyncio.sleep(script.first_delay_ms / 1000)
        write(_HEAD)
        for at, event in enumerate(events):
            if at == script.error_after:
                write(_chunk(_event({"error": {"message": "secret detail", "type": "X", "code": 500}})))
                write(_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
                self._done()
                return
            if at == script.cut_after:
                self.transport.abort()
                return
            if at == script.hang_after:
                await asyncio.sleep(3600)
            write(_chunk(event))
            # Each event leaves on its own, as from an engine that has just made the token.
            await asyncio.sleep(script.delay_ms / 1000)
        write(_chunk(tail) + b"0\r\n\r\n")
        self._done()

    def _done(self) -> None:
        self.running = False
        self.task = None
        self.engine.num_running -= 1
        self.engine.num_finished += 1

    def _plain(self, script: Script, body: dict[str, Any], ids: Any, usage: dict[str, Any], *, chat: bool) -> None:
        text = "".join(pieces(script))
        part = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices: list[dict[str, Any]] = [
            {"index": i, **part, "logprobs": None, "finish_reason": script.finish_reason}
            for i in range(body.get("n") or 1)
        ]
        answer: dict[str, Any] = {"id": "x", "object": "x", "created": 0, "model": self.engine.model}
        answer |= {"choices": choices, "usage": usage}
        if body.get("return_token_ids"):
            given = [1, 2, 3] if script.wrong_ids else ids
            (answer if chat else choices[0])["prompt_token_ids"] = given
            banned = (body.get("vllm_xargs") or {}).get("strongroom_banned_tokens", ()) if script.bans else ()
            choices[0]["token_ids"] = [next(token for token in range(7, 1000) if token not in banned)]
        self._json(answer)
        self.engine.num_finished += 1


_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


@lru_cache(maxsize=256)
def _whole(events: tuple[bytes, ...]) -> bytes:
    return b"".join(_chunk(event) for event in events)


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


async def serve(engine: Engine, *, uds: str | None, port: int | None) -> asyncio.Server:
    """Listen; the caller closes the server."""
    loop = asyncio.get_running_loop()
    if uds is not None:
        _unlink(uds)
        return await loop.create_unix_server(lambda: Connection(engine), uds, backlog=4096)
    return await loop.create_server(lambda: Connection(engine), "127.0.0.1", port, backlog=4096)


async def _main(args: argparse.Namespace) -> None:
    script = Script(args.text, args.num_tokens, args.delay_ms, args.separate)
    engine = Engine(args.model, args.max_model_len, script)
    engine.adapters = args.adapter
    server = await serve(engine, uds=args.uds, port=args.port)
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    await stop.wait()
    server.close()
    if args.uds:
        _unlink(args.uds)


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--uds", help="path of the unix socket")
    where.add_argument("--port", type=int, help="port on 127.0.0.1")
    parser.add_argument("--model", default="instant")
    parser.add_argument("--adapter", action="append", default=[], help="a further name it answers to")
    parser.add_argument("--max-model-len", type=int, default=131072)
    parser.add_argument("--text", default=PROSE)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--delay-ms", type=float, default=0.0, help="pause after each token")
    parser.add_argument("--separate", action="store_true", help="write each event on its own")
    uvloop.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
