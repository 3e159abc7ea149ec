"""Fill in the middle as llama.cpp says it (`/infill`): prefix, suffix and extra files in, `content` out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from server.api import fields
from server.api.wire import assemble, findings_of
from server.types import Completion, ModelRequest, WireFormat

if TYPE_CHECKING:
    from server.api.problems import Problem
    from server.types import Delta, Outcome

MAX_EXTRA_FILES = 64
DEFAULT_MODEL = "autocomplete"
"""The alias that answers where a client of this route names no model, for llama.cpp's clients never do."""


class InfillFormat:
    """`POST /infill`."""

    wire_format = WireFormat.INFILL
    action = "model:fim:create"

    def parse(self, body: dict[str, Any]) -> ModelRequest:
        """Return the pipeline's request; llama.cpp's sampler settings are ignored.

        Raises:
            RequestError: A field is wrong or refused, by name.
        """
        fields.refuse({name: value for name, value in body.items() if name != "grammar"})
        prefix = _string(body, "input_prefix")
        return ModelRequest(
            wire_format=self.wire_format,
            model=fields.model_name(body) if body.get("model") else DEFAULT_MODEL,
            payload=Completion(
                prompt=_extra(body.get("input_extra")) + prefix + _string(body, "prompt"),
                suffix=_string(body, "input_suffix"),
            ),
            sampling=fields.sampling(
                {name: body.get(name) for name in ("temperature", "top_p", "seed", "stop", "logit_bias")}
            ),
            max_tokens=_n_predict(body),
            stream=fields.flag(body, "stream"),
        )

    def reply(self, request: ModelRequest, request_id: str, created_s: int) -> InfillReply:
        """Return a writer for the answer."""
        return InfillReply(request)

    def problem(self, problem: Problem, request_id: str) -> bytes:
        """Return the error body."""
        return problem.openai_bytes()


class InfillReply:
    """Writes llama.cpp's `content` objects."""

    def __init__(self, request: ModelRequest) -> None:
        self._request = request

    def begin(self, prompt_tokens: int) -> bytes:
        """Return nothing: this format opens with its first text."""
        return b""

    def events(self, deltas: list[Delta]) -> bytes:
        """Return one event a delta."""
        return b"".join(
            b'data: {"index":0,"content":' + orjson.dumps(delta.text) + b',"stop":false}\n\n' for delta in deltas
        )

    def end(self, last: list[Delta], outcome: Outcome) -> bytes:
        """Return the event that says stop."""
        return b"data: " + self._body("".join(delta.text for delta in last), outcome) + b"\n\n"

    def heartbeat(self) -> bytes:
        """Return an event with empty content."""
        return b'data: {"index":0,"content":"","stop":false}\n\n'

    def error(self, problem: Problem) -> bytes:
        """Return the error event."""
        return b"data: " + problem.openai_bytes() + b"\n\n"

    def whole(self, deltas: list[Delta], outcome: Outcome) -> bytes:
        """Return the plain body."""
        return self._body("".join(assemble(deltas)[0].text), outcome)

    def _body(self, text: str, outcome: Outcome) -> bytes:
        limit = outcome.finish_reasons.get(0) == "length"
        word = outcome.stops.get(0, "")
        body: dict[str, Any] = {
            "index": 0,
            "content": text,
            "stop": True,
            "model": self._request.model,
            "stop_type": "limit" if limit else "word" if word else "eos",
            "stopping_word": word,
            "tokens_predicted": outcome.usage.completion_tokens,
            "tokens_evaluated": outcome.usage.prompt_tokens,
            "truncated": False,
        }
        if outcome.scan is not None:
            body["strongroom"] = {"scan": outcome.scan.state, "findings": findings_of(outcome)}
        return orjson.dumps(body)


def _string(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise fields.wrong(name, "a string")
    return value


def _n_predict(body: dict[str, Any]) -> int | None:
    if body.get("n_predict") == -1:  # llama.cpp's "no limit"
        return None
    return fields.max_tokens(body, "n_predict", "max_tokens")


def _extra(value: Any) -> str:
    """Return the extra files as text before the prefix, each under its name in a comment."""
    if value is None:
        return ""
    if not isinstance(value, list) or len(value) > MAX_EXTRA_FILES:
        raise fields.wrong("input_extra", f"a list of at most {MAX_EXTRA_FILES} files")
    texts = []
    for i, item in enumerate(value):
        if not isinstance(item, dict) or not isinstance(item.get("text"), str):
            raise fields.wrong(f"input_extra[{i}]", "an object with a text")
        name = item.get("filename")
        texts.append(f"# {name[:200] if isinstance(name, str) else 'context'}\n{item['text']}\n")
    return "".join(texts)
