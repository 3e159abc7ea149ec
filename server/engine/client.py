"""`ports.Engine` over HTTP: one model's engine on a unix socket or at a URL."""

from __future__ import annotations

import asyncio
import re
import ssl
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson

from server.engine.http import Address, Pool, Timeouts, TransportError
from server.engine.wire import BANS_FIELD, EventParser, build_request, parse_embeddings, raise_refusal, without_mark
from server.errors import ConfigError, EngineError, EngineUnavailableError, StrongroomError
from server.types import Chat, Embedding

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from server.engine.http import Connection
    from server.types import Delta, ModelRequest, Prompt, RequestId, Secret, Usage

# No text tokenises to these, in this order: an engine that renders or re-encodes cannot give them back by accident.
PROBE_IDS = (7, 11, 13, 17, 19, 23, 29, 31)
MAX_BODY_BYTES = 256 * 1024 * 1024
HEALTH_LIMIT_S = 5.0
SELF_TEST_LIMIT_S = 120.0
HTTP_OK = 200
MAX_HEALTH_FAILURES = 3


def unix_address(path: Path) -> Address:
    """Address of an engine on this machine."""
    return Address(path=str(path))


def url_address(url: str, *, ca_file: Path | None = None, allow_plaintext: bool = False) -> Address:
    """Address of a remote engine; TLS with the given CA and no other.

    Args:
        url: `https://host[:port]`, nothing behind it.
        ca_file: PEM of the only CA that may have signed the engine's certificate.
        allow_plaintext: Permit `http://`, for an engine behind a private link of the operator's own.

    Raises:
        ConfigError: The URL is not one of these, or `https` comes without `ca_file`.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as err:
        raise ConfigError("The engine's URL can't be read. Expected https://host:port.") from err
    if not parts.hostname or parts.path not in {"", "/"} or parts.query or parts.fragment or parts.username is not None:
        raise ConfigError(
            f"The engine's URL must be https://host:port and nothing more; got a URL for {parts.hostname}."
        )
    if parts.scheme == "http" and allow_plaintext:
        return Address(host=parts.hostname, port=port or 80)
    if parts.scheme != "https":
        raise ConfigError(f"The engine at {parts.hostname} must be reached by https; got '{parts.scheme}'.")
    if ca_file is None:
        raise ConfigError(f"The engine at {parts.hostname} needs 'ca_file': the CA that signed its certificate.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_verify_locations(cafile=ca_file)
    except (OSError, ssl.SSLError) as err:
        raise ConfigError(f"The CA file {ca_file} can't be read: a PEM certificate is expected.") from err
    return Address(host=parts.hostname, port=port or 443, tls=context)


class EngineClient:
    """One model's engine. It answers nothing until `self_test` has passed, and again after each restart of the engine.

    Args:
        model: The id that callers use.
        max_model_len: Context length in tokens, as the engine was started with.
        address: Where it listens.
        served_name: The name that the engine knows the model by (`model` if None), such as a LoRA adapter's.
        embeds: Whether it is an embedding model.
        messages: Whether it gets neutralised messages, which it renders by itself, in place of token ids.
        timeouts: Bounds of one exchange.
        api_key: Sent as a bearer token to a remote engine.

    Raises:
        ConfigError: The API key is not one.
    """

    def __init__(
        self,
        model: str,
        max_model_len: int,
        address: Address,
        *,
        served_name: str | None = None,
        embeds: bool = False,
        messages: bool = False,
        timeouts: Timeouts | None = None,
        api_key: Secret | None = None,
    ) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.embeds = embeds
        self._messages = messages
        self._served_name = served_name or model
        self._address = address
        self._timeouts = timeouts or Timeouts()
        headers: tuple[tuple[str, str], ...] = ()
        if api_key is not None:
            if not re.fullmatch(r"[\x21-\x7e]+", api_key.reveal()):
                raise ConfigError(
                    f"The API key for the engine of model '{model}' has characters that a header can't hold."
                )
            headers = (("authorization", f"Bearer {api_key.reveal()}"),)
        self._pool = Pool(address, self._timeouts, headers=headers, on_connect=self._check_identity)
        # Which incarnation of the engine passed the self-test. A restarted engine has a new socket file, hence another
        # identity, and gets no request before its own test.
        self._tested: object = None
        self._testing: object = None
        self._bans_proved: object = None  # by which incarnation that it bans what it is told to
        self._num_cuts = 0

    @property
    def ready(self) -> bool:
        """Whether the engine passed its self-test and has not gone away since."""
        return self._tested is not None

    def stream(
        self, prompt: Prompt, request: ModelRequest, *, max_tokens: int, cache_salt: str, request_id: RequestId
    ) -> AsyncGenerator[list[Delta], None]:
        """Return what the engine says, a list for each read of its socket; closing the generator aborts the request.

        Nothing goes to the engine before the first list is asked for; usage comes last, with the answer's end.

        Raises:
            EngineUnavailableError: The engine is down, starting, or has not passed its self-test.
            EngineError: It failed on this request.
            RequestError: It refuses a parameter of this request.
            ConfigError: Policy bans tokens, and this engine says them all the same.
        """
        del request_id  # the engine's logs need no name of ours
        message = build_request(prompt, request, model=self._served_name, max_tokens=max_tokens, cache_salt=cache_salt)
        return self._exchange(message, prompt, request)

    async def _exchange(
        self, message: tuple[str, bytes], prompt: Prompt, request: ModelRequest
    ) -> AsyncGenerator[list[Delta], None]:
        if self._tested is None:
            raise EngineUnavailableError(f"The engine of model '{self.model}' is starting. Please try again.")
        if prompt.banned_ids and self._bans_proved != self._tested:
            await self._prove_bans()
        if isinstance(request.payload, Embedding):
            deltas = parse_embeddings(await self._call("POST", *message, limit_s=self._timeouts.first_byte_s))
            self._check_usage(prompt, deltas[-1].usage)
            yield deltas
            return
        parser = EventParser(chat=isinstance(request.payload, Chat))
        usage: Usage | None = None
        mark = prompt.conversation.mark if prompt.conversation is not None else ""
        connection: Connection | None = None
        try:
            connection = await self._pool.open("POST", *message)
            del message  # a stream may stay open for long, and its prompt is kilobytes
            await self._require_ok(connection)
            limit_s = self._timeouts.first_byte_s
            while data := await connection.read(limit_s):
                limit_s = self._timeouts.stall_s
                if deltas := parser.feed(data):
                    usage = deltas[-1].usage or usage
                    yield [without_mark(delta, mark) for delta in deltas] if mark else deltas
        except TransportError as err:
            raise self._translate(err) from err
        finally:
            if connection is not None:
                self._pool.release(connection)
        if not parser.done:
            raise EngineError("The engine ended its answer early. Please try again.")
        self._check_usage(prompt, usage)

    async def health(self) -> bool:
        """Whether the engine answers its health check now; says nothing of the self-test."""
        try:
            connection = await self._pool.open("GET", "/health")
        except TransportError:
            return False
        try:
            return await connection.head(HEALTH_LIMIT_S) == HTTP_OK and not await connection.read(HEALTH_LIMIT_S)
        except TransportError:
            return False
        finally:
            self._pool.release(connection)

    async def metrics_text(self) -> str:
        """The engine's own Prometheus page.

        Raises:
            EngineUnavailableError: The engine is down.
            EngineError: It failed.
        """
        return (await self._call("GET", "/metrics", limit_s=HEALTH_LIMIT_S)).decode("utf-8", "replace")

    async def self_test(self) -> None:
        """Prove that the engine computes exactly the token ids it is given; until then it is not used.

        Raises:
            EngineUnavailableError: The engine is down.
            EngineError: It failed.
            ConfigError: It serves another model, or did not take the ids as they are: it can't be used.
        """
        self._tested = None
        self._testing = self._identity()
        self._pool.close()
        try:
            await self._test_model()
            if (
                not self._messages
            ):  # such an engine renders by itself: there are no ids to hold it to (docs/templates.md)
                await self._test_prompts()
            self._tested = self._testing
        finally:
            self._testing = None

    async def wait_ready(self, limit_s: float, *, interval_s: float = 0.5) -> None:
        """Return once the engine is healthy and has passed its self-test.

        Raises:
            EngineUnavailableError: Not within `limit_s`.
            EngineError: It failed on the self-test.
            ConfigError: It did not pass the self-test.
        """
        try:
            async with asyncio.timeout(limit_s):
                while self._tested is None:
                    with suppress(EngineUnavailableError):
                        await self.self_test()
                        return
                    await asyncio.sleep(interval_s)
        except TimeoutError as err:
            raise EngineUnavailableError(
                f"The engine of model '{self.model}' did not become ready within {limit_s:.0f} s."
            ) from err

    async def watch(
        self, *, interval_s: float = 1.0, on_change: Callable[[bool, str | None], None] | None = None
    ) -> None:
        """Keep `ready` true to the facts for ever; run it as a task.

        Args:
            interval_s: Seconds between two looks.
            on_change: Called with readiness and, where an engine was refused, the error's code.
        """
        was_ready: bool | None = None
        num_failures = 0
        while True:
            refusal: str | None = None
            if self._tested is None:
                try:
                    await self.self_test()
                except StrongroomError as err:
                    refusal = err.code
                num_failures = 0
            # One slow answer of a busy engine must not turn all callers away; each of them sees a dead one for himself.
            elif await self.health():
                num_failures = 0
            elif (num_failures := num_failures + 1) >= MAX_HEALTH_FAILURES:
                self._tested = None
            if on_change is not None and self.ready != was_ready:
                on_change(self.ready, refusal)
            was_ready = self.ready
            await asyncio.sleep(interval_s)

    def close(self) -> None:
        """Close idle connections."""
        self._pool.close()

    # --- inside ---

    async def _call(self, method: str, path: str, body: bytes = b"", *, limit_s: float) -> bytes:
        connection: Connection | None = None
        try:
            connection = await self._pool.open(method, path, body)
            await self._require_ok(connection, limit_s)
            return await _read_all(connection, limit_s)
        except TransportError as err:
            raise self._translate(err) from err
        finally:
            if connection is not None:
                self._pool.release(connection)

    async def _require_ok(self, connection: Connection, limit_s: float | None = None) -> None:
        status = await connection.head(limit_s if limit_s is not None else self._timeouts.first_byte_s)
        if status == HTTP_OK:
            return
        body: Any = None
        with suppress(orjson.JSONDecodeError):
            body = orjson.loads(await _read_all(connection, self._timeouts.stall_s))
        raise_refusal(body, status=status)

    def _translate(self, err: TransportError) -> StrongroomError:
        if err.answered:
            return EngineError("The engine stopped while it answered. Please try again.")
        self._lose()
        return EngineUnavailableError(f"The engine of model '{self.model}' is down. Please try again.")

    def _check_usage(self, prompt: Prompt, usage: Usage | None) -> None:
        num_tokens = len(prompt.token_ids) + sum(map(len, prompt.inputs))
        # An engine that renders by itself counts what it made of the messages.
        if usage is None or (usage.prompt_tokens != num_tokens and prompt.conversation is None):
            # The self-test passed, and yet another prompt than ours was answered: stop using this engine.
            self._tested = None
            raise EngineError("The engine did not answer the prompt that it was given.")

    def _lose(self) -> None:
        self._num_cuts += 1
        if self._address.path is None:  # a socket file shows a restart by itself; of a remote engine this is all we see
            self._tested = None

    def _identity(self) -> object:
        if self._address.path is None:
            return ("remote", self._num_cuts)
        try:
            stat = Path(self._address.path).stat()
        except OSError:
            return ("absent",)
        return (stat.st_dev, stat.st_ino, stat.st_ctime_ns)

    def _check_identity(self) -> None:
        if self._address.path is None or self._testing is not None:
            return
        if self._tested is not None and self._identity() != self._tested:
            self._tested = None
            raise TransportError("The engine was restarted.", answered=False)

    async def _test_model(self) -> None:
        answer = _parse_answer(await self._call("GET", "/v1/models", limit_s=SELF_TEST_LIMIT_S))
        entries = answer.get("data")
        entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        lengths = {entry.get("id"): entry.get("max_model_len") for entry in entries}
        if self._served_name not in lengths:
            raise ConfigError(f"The engine does not serve model '{self._served_name}'. Check its 'served_name'.")
        length = lengths[self._served_name]
        if isinstance(length, int) and length < self.max_model_len:
            raise ConfigError(
                f"The engine of model '{self.model}' has a context of {length} tokens, not {self.max_model_len}."
            )

    async def _test_prompts(self) -> None:
        if self.embeds:
            await self._test_embedding()
            return
        ids = list(PROBE_IDS)
        await self._test_ids("/v1/completions", {"prompt": ids, "max_tokens": 1})
        chat = {"messages": [], "kv_transfer_params": {"prompt_token_ids": ids}, "max_completion_tokens": 1}
        await self._test_ids("/v1/chat/completions", chat)

    async def _test_ids(self, path: str, fields: dict[str, Any]) -> None:
        body = {**fields, "model": self._served_name, "return_token_ids": True, "temperature": 0}
        answer = _parse_answer(await self._call("POST", path, orjson.dumps(body), limit_s=SELF_TEST_LIMIT_S))
        ids = answer.get("prompt_token_ids")
        choices = answer.get("choices")
        if ids is None and isinstance(choices, list) and choices and isinstance(choices[0], dict):
            ids = choices[0].get("prompt_token_ids")  # completions have them a level deeper
        if ids != list(PROBE_IDS):
            raise ConfigError(
                f"The engine did not take token ids as they are on {path}: this version of it cannot be used, because "
                "prompts would be rendered without the security template's protection."
            )

    async def _prove_bans(self) -> None:
        """Ban the token that the engine would say, and look whether it says another; once for each start of it.

        An engine without our logits processor, or one that speculates, takes the ban and leaves it out without a word.

        Raises:
            ConfigError: It says the banned token.
        """
        tested = self._tested
        first = await self._say_one(())
        if await self._say_one((first,)) == first:
            raise ConfigError(
                f"Policy bans tokens, and the engine of model '{self.model}' does not hold to it: it lacks our logits "
                "processor, or it speculates (speculative_ngram). Turn that off, or take the ban out for this model."
            )
        self._bans_proved = tested

    async def _say_one(self, banned_ids: tuple[int, ...]) -> int:
        """Return the token that the engine says after the probe, one that does not end the answer."""
        body: dict[str, Any] = {"model": self._served_name, "prompt": list(PROBE_IDS), "max_tokens": 1, "min_tokens": 1}
        body |= {"temperature": 0, "return_token_ids": True}
        if banned_ids:
            body["vllm_xargs"] = {BANS_FIELD: list(banned_ids)}
        answer = _parse_answer(
            await self._call("POST", "/v1/completions", orjson.dumps(body), limit_s=SELF_TEST_LIMIT_S)
        )
        try:
            (token,) = answer["choices"][0]["token_ids"]
            return int(token)
        except (KeyError, IndexError, TypeError, ValueError) as err:
            raise EngineError("The engine did not say which token it chose.") from err

    async def _test_embedding(self) -> None:
        body = {"model": self._served_name, "input": list(PROBE_IDS), "encoding_format": "float"}
        deltas = parse_embeddings(
            await self._call("POST", "/v1/embeddings", orjson.dumps(body), limit_s=SELF_TEST_LIMIT_S)
        )
        usage = deltas[-1].usage
        if usage is None or usage.prompt_tokens != len(PROBE_IDS) or not deltas[0].embedding:
            raise ConfigError("The engine did not embed the token ids that it was given.")


def _parse_answer(body: bytes) -> dict[str, Any]:
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        answer = None
    if not isinstance(answer, dict):
        raise EngineError("The engine sent an answer that could not be read.")
    return answer


async def _read_all(connection: Connection, limit_s: float) -> bytes:
    body = bytearray()
    while chunk := await connection.read(limit_s):
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise EngineError("The engine sent a body beyond the limit.")
    return bytes(body)
