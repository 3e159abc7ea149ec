"""vLLM's HTTP contract: request bodies from known fields, answers to deltas; no I/O."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import orjson

from server.errors import ContextLengthError, EngineError, EngineUnavailableError, RequestError
from server.types import Chat, Completion, Delta, Embedding, Usage

if TYPE_CHECKING:
    from server.types import Conversation, ModelRequest, Prompt

MAX_LINE_BYTES = 8 * 1024 * 1024
BANS_FIELD = "strongroom_banned_tokens"  # what our logits processor in the engine reads
PLAIN_STREAM_INTERVAL = 16  # a caller who does not stream does not need a chunk for each token

# What may go to the engine beside what this file writes itself. Whatever a wire format lets through that is not here is
# our own mistake, and is refused rather than passed on.
_SAMPLING = frozenset(
    {
        "frequency_penalty", "ignore_eos", "logit_bias", "logprobs", "min_p", "min_tokens", "n", "presence_penalty",
        "repetition_penalty", "seed", "stop", "stop_token_ids", "temperature", "top_k", "top_logprobs", "top_p",
    }
)  # fmt: skip


def build_request(
    prompt: Prompt, request: ModelRequest, *, model: str, max_tokens: int, cache_salt: str
) -> tuple[str, bytes]:
    """Return path and JSON body for the engine; every field is written here or allow-listed.

    Raises:
        RequestError: `request.sampling` holds a field that is not on the allow-list.
    """
    payload = request.payload
    body: dict[str, Any] = {"model": model}
    if isinstance(payload, Embedding):
        body["input"] = list(prompt.inputs) if prompt.inputs else [prompt.token_ids]
        body["encoding_format"] = "float"
        if payload.dimensions is not None:
            body["dimensions"] = payload.dimensions
        return "/v1/embeddings", orjson.dumps(body)
    for name, value in request.sampling.items():
        if name not in _SAMPLING:
            raise RequestError(
                f"The engine does not take the field '{name}'. Leave it out.", param=name, code="unsupported_parameter"
            )
        body[name] = value
    body["stream"] = True
    body["stream_options"] = {"include_usage": True}
    if cache_salt and prompt.conversation is None:
        body["cache_salt"] = cache_salt
    if prompt.conversation is not None:
        return "/v1/chat/completions", orjson.dumps(_plain_chat(body, payload, prompt.conversation, max_tokens))
    if prompt.banned_ids:
        body["vllm_xargs"] = {BANS_FIELD: list(prompt.banned_ids)}
    if isinstance(payload, Completion):
        body["prompt"] = prompt.token_ids
        body["max_tokens"] = max_tokens
        path = "/v1/completions"
    else:
        # Ready ids take the place of the messages; these must be empty, or vLLM may render them instead.
        body["messages"] = []
        body["kv_transfer_params"] = {"prompt_token_ids": prompt.token_ids}
        body["max_completion_tokens"] = max_tokens
        _add_tools(body, payload, list(payload.tools))
        path = "/v1/chat/completions"
    if not request.stream and not body.get("tools"):
        body["stream_interval"] = PLAIN_STREAM_INTERVAL
    return path, orjson.dumps(body)


def _plain_chat(
    body: dict[str, Any], payload: Chat | Completion, conversation: Conversation, max_tokens: int
) -> dict[str, Any]:
    """Return the body for an engine that is no vLLM of ours: nothing in it that only vLLM knows."""
    body["messages"] = conversation.messages
    body["max_tokens"] = max_tokens
    if isinstance(payload, Chat):
        _add_tools(body, payload, conversation.tools)
    return body


def without_mark(delta: Delta, mark: str) -> Delta:
    """Return a delta as the client gets it: what quotes a control token comes back as it was sent."""
    calls = delta.tool_calls
    if calls:
        calls = orjson.loads(orjson.dumps(calls).replace(mark.encode(), b""))
    return replace(
        delta, text=delta.text.replace(mark, ""), reasoning=delta.reasoning.replace(mark, ""), tool_calls=calls
    )


def _add_tools(body: dict[str, Any], chat: Chat, tools: list[dict[str, Any]]) -> None:
    if chat.response_format is not None:
        body["response_format"] = chat.response_format
    if not chat.tools:
        return
    choice = chat.tool_choice if chat.tool_choice is not None else "auto"
    if choice == "required" or isinstance(choice, dict):
        # Without `strict` vLLM fixes the name of a forced tool, but not its arguments.
        tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]
    body["tools"] = tools
    body["tool_choice"] = choice
    if chat.parallel_tool_calls is not None:
        body["parallel_tool_calls"] = chat.parallel_tool_calls


class EventParser:
    """Server-sent events, cut anywhere, to deltas.

    Args:
        chat: Whether choices carry `delta` (chat completions) or `text` (completions).
    """

    def __init__(self, *, chat: bool) -> None:
        self.done = False
        self._to_delta = _chat_delta if chat else _text_delta
        self._text_key = b'"content":' if chat else b'"text":'
        self._rest = b""
        self._usage: Usage | None = None
        # What stands before and after the text in the events of this stream; nearly all differ in nothing else.
        self._frame = (b"", b"")

    def feed(self, data: bytes) -> list[Delta]:
        """Return the deltas of all events that are whole now; usage is the last of all, whatever engines repeat.

        Raises:
            EngineError: The engine reported an error, or sent what is no event.
            RequestError: The engine refused the request's parameters.
        """
        lines = (self._rest + data if self._rest else data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_LINE_BYTES:
            raise EngineError("The engine sent an event beyond the limit.")
        deltas: list[Delta] = []
        to_delta = self._to_delta
        head, tail = self._frame
        start, stop = len(head), -len(tail)
        for line in lines:
            if not line:
                continue
            if head and line.startswith(head) and line.endswith(tail):
                # Whole JSON strings only: anything else that fits between, such as one more field, fails to load.
                try:
                    text = orjson.loads(line[start:stop])
                except orjson.JSONDecodeError:
                    text = None
                if text.__class__ is str:
                    deltas.append(Delta(0, text))
                    continue
            if not line.startswith(b"data:"):  # comments, event names
                continue
            if line.startswith(b"data: [DONE]"):
                self.done = True
                if self._usage is not None:
                    deltas.append(Delta(usage=self._usage))
                break
            try:
                event = orjson.loads(line[5:])
                choices = event.get("choices")
                if choices:
                    deltas.extend([to_delta(choice) for choice in choices])
                    if not head and len(choices) == 1:
                        head, tail = self._learn(line, event, deltas[-1])
                        start, stop = len(head), -len(tail)
                if usage := event.get("usage"):
                    self._usage = parse_usage(usage)
            except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as err:
                raise EngineError("The engine sent an event that could not be read.") from err
            if choices is None:
                raise_refusal(event, status=500)
        return deltas

    def _learn(self, line: bytes, event: dict[str, Any], delta: Delta) -> tuple[bytes, bytes]:
        """Keep what stands around the text of a plain event: another text between makes another such event."""
        spelled = self._text_key + orjson.dumps(delta.text)
        before, found, after = line.partition(spelled)
        # Not found: the text is spelled in another way, such as with escapes; a later event may do. An opening event,
        # without text, says more than those that follow.
        if (
            found
            and delta.text
            and delta == Delta(0, delta.text)
            and not event.get("usage")
            and line.count(self._text_key) == 1
        ):
            self._frame = before + self._text_key, after
        return self._frame


def _chat_delta(choice: dict[str, Any]) -> Delta:
    delta = choice["delta"]
    calls = delta.get("tool_calls") or None
    if calls is not None and calls.__class__ is not list:
        raise TypeError
    return _delta(choice, delta.get("content") or "", delta.get("reasoning") or "", calls)


def _text_delta(choice: dict[str, Any]) -> Delta:
    return _delta(choice, choice["text"], "", None)


def _delta(choice: dict[str, Any], text: Any, reasoning: Any, calls: list[dict[str, Any]] | None) -> Delta:
    """Check what later code relies on; a remote engine is not ours. By class, since this runs for every token."""
    index, finish_reason = choice["index"], choice.get("finish_reason")
    if text.__class__ is not str or reasoning.__class__ is not str or index.__class__ is not int:
        raise TypeError
    if finish_reason is not None and finish_reason.__class__ is not str:
        raise TypeError
    delta = Delta(index, text, reasoning, calls, finish_reason, choice.get("logprobs"))
    if finish_reason is not None:
        stop = choice.get("stop_reason")  # vLLM's own field; a number where a token ended the answer
        delta.stop = stop if stop.__class__ is str else None
    return delta


def parse_usage(usage: dict[str, Any]) -> Usage:
    """The engine's counts."""
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=int(usage["prompt_tokens"]),
        completion_tokens=int(usage.get("completion_tokens") or 0),
        cached_tokens=int(details.get("cached_tokens") or 0),
    )


def parse_embeddings(body: bytes) -> list[Delta]:
    """One delta a vector, then the usage.

    Raises:
        EngineError: The body is not the embeddings contract.
    """
    try:
        answer = orjson.loads(body)
        deltas = [
            Delta(index=item["index"], embedding=item["embedding"], finish_reason="stop") for item in answer["data"]
        ]
        deltas.append(Delta(usage=parse_usage(answer["usage"])))
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError, ValueError) as err:
        raise EngineError("The engine sent embeddings that could not be read.") from err
    return deltas


def raise_refusal(body: Any, *, status: int) -> NoReturn:
    """Turn the engine's error into ours; its own words never leave, since they may quote the prompt or a path.

    Args:
        body: The decoded error body, or None.
        status: The HTTP status, or 500 for an error inside a stream, which carries a code of its own.

    Raises:
        EngineUnavailableError: The engine is not there (502 to 504).
        ContextLengthError: The prompt and the answer do not fit.
        RequestError: The engine refuses the parameters (400, 422).
        EngineError: Everything else.
    """
    error = body.get("error") if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {}
    code = error.get("code")
    if status == 500 and isinstance(code, int):
        status = code
    if status in {502, 503, 504}:
        raise EngineUnavailableError("The engine of this model cannot answer now. Please try again.")
    if status in {400, 422}:
        message = str(error.get("message", "")).lower()
        if "maximum context length" in message:
            raise RequestError(
                "The prompt does not fit this model's maximum context length. Please shorten it.",
                code=ContextLengthError.code,
            )
        structured = any(word in message for word in ("schema", "grammar", "regex", "structured"))
        what = "the JSON schema of the tools or of 'response_format'" if structured else "a parameter of this request"
        raise RequestError(
            f"The engine refuses {what}. Simplify it or leave it out.",
            param="response_format" if structured else None,
            code="unsupported_parameter",
        )
    raise EngineError(f"The engine failed on this request (status {status}). Please try again.")
