"""OpenAI text completions, with `suffix` for fill in the middle: where this format keeps its text and events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from server.api import fields
from server.api.chat import usage_of, with_scan
from server.api.wire import assemble, findings_of
from server.types import Completion, ModelRequest, WireFormat

if TYPE_CHECKING:
    from server.api.problems import Problem
    from server.types import Delta, Outcome


class CompletionFormat:
    """`POST /v1/completions`."""

    wire_format = WireFormat.COMPLETION
    action = "model:completion:create"

    def parse(self, body: dict[str, Any]) -> ModelRequest:
        """Return the pipeline's request.

        Raises:
            RequestError: A field is wrong or refused, by name.
        """
        fields.refuse(body)
        sampling = fields.sampling(body)
        best_of = fields.integer(body, "best_of", low=1, high=fields.MAX_CHOICES)
        if best_of is not None and best_of != sampling.get("n", 1):
            raise fields.wrong("best_of", "left out, or equal to n")
        logprobs = fields.integer(body, "logprobs", low=0, high=fields.MAX_TOP_LOGPROBS)
        if logprobs is not None:
            sampling["logprobs"] = logprobs
        return ModelRequest(
            wire_format=self.wire_format,
            model=fields.model_name(body),
            payload=Completion(prompt=parse_prompt(body.get("prompt")), suffix=parse_suffix(body.get("suffix"))),
            sampling=sampling,
            max_tokens=fields.max_tokens(body, "max_tokens", "max_completion_tokens"),
            stream=fields.flag(body, "stream"),
            include_usage=fields.stream_options(body),
        )

    def reply(self, request: ModelRequest, request_id: str, created_s: int) -> CompletionReply:
        """Return a writer for the answer."""
        return CompletionReply(request, "cmpl-" + request_id.removeprefix("req_"), created_s)

    def problem(self, problem: Problem, request_id: str) -> bytes:
        """Return the error body."""
        return problem.openai_bytes()


class CompletionReply:
    """Writes `text_completion` objects."""

    def __init__(self, request: ModelRequest, reply_id: str, created_s: int) -> None:
        self._request = request
        self._object = {"id": reply_id, "object": "text_completion", "created": created_s, "model": request.model}
        self._head = b"data: " + orjson.dumps(self._object)[:-1] + b',"choices":['
        self._text = self._head + b'{"index":0,"text":'

    def begin(self, prompt_tokens: int) -> bytes:
        """Return nothing: this format opens with its first text."""
        return b""

    def events(self, deltas: list[Delta]) -> bytes:
        """Return one event a delta."""
        return b"".join(
            [
                self._text + orjson.dumps(delta.text) + b',"logprobs":null,"finish_reason":null}]}\n\n'
                if delta.index == 0 and delta.logprobs is None
                else self._event(delta)
                for delta in deltas
            ]
        )

    def end(self, last: list[Delta], outcome: Outcome) -> bytes:
        """Return finish reasons, the scan's verdict, usage where asked, and `[DONE]`."""
        ends = [delta for delta in last if delta.finish_reason is not None]
        pieces = [self._event(delta) for delta in ends[:-1]]
        pieces += [with_scan(self._event(delta), outcome) for delta in ends[-1:]]
        if self._request.include_usage:
            pieces.append(self._head + b'],"usage":' + orjson.dumps(usage_of(outcome.usage)) + b"}\n\n")
        pieces.append(b"data: [DONE]\n\n")
        return b"".join(pieces)

    def heartbeat(self) -> bytes:
        """Return an event with empty text."""
        return self._text + b'"","logprobs":null,"finish_reason":null}]}\n\n'

    def error(self, problem: Problem) -> bytes:
        """Return the error event; no `[DONE]` follows, for the answer is not done."""
        return b"data: " + problem.openai_bytes() + b"\n\n"

    def whole(self, deltas: list[Delta], outcome: Outcome) -> bytes:
        """Return the plain body."""
        choices = [
            {
                "index": index,
                "text": "".join(choice.text),
                "logprobs": _joined(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in assemble(deltas).items()
        ]
        body: dict[str, Any] = {**self._object, "choices": choices, "usage": usage_of(outcome.usage)}
        if outcome.scan is not None:
            body["strongroom"] = {"scan": outcome.scan.state, "findings": findings_of(outcome)}
        return orjson.dumps(body)

    def _event(self, delta: Delta) -> bytes:
        choice = {
            "index": delta.index,
            "text": delta.text,
            "logprobs": delta.logprobs,
            "finish_reason": delta.finish_reason,
        }
        return self._head + orjson.dumps(choice) + b"]}\n\n"


def parse_prompt(value: Any) -> str:
    """Return the prompt: one string, or a list that holds one.

    Raises:
        RequestError: It is a list of several, of token ids, or something else.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        raise fields.wrong(
            "prompt", "one string (token ids and lists of prompts are not accepted; send one request each)"
        )
    return value


def parse_suffix(value: Any) -> str | None:
    """Return the text after the cursor, None where there is none.

    Raises:
        RequestError: It is not a string.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise fields.wrong("suffix", "a string")
    return value


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return one logprobs object from the streamed ones, whose members are parallel lists."""
    if not parts:
        return None
    return {name: [item for part in parts for item in part.get(name) or ()] for name in parts[0]}
