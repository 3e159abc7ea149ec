"""OpenAI embeddings, as floats or base64: where this format keeps its inputs and vectors."""

from __future__ import annotations

import base64
import struct
from typing import TYPE_CHECKING, Any

import orjson

from server.api import fields
from server.errors import RequestError
from server.types import Embedding, ModelRequest, WireFormat

if TYPE_CHECKING:
    from server.api.problems import Problem
    from server.types import Delta, Outcome

MAX_INPUTS = 512


class EmbeddingFormat:
    """`POST /v1/embeddings`."""

    wire_format = WireFormat.EMBEDDING
    action = "model:embedding:create"

    def parse(self, body: dict[str, Any]) -> ModelRequest:
        """Return the pipeline's request.

        Raises:
            RequestError: A field is wrong or refused, by name.
        """
        fields.refuse(body)
        encoding = body.get("encoding_format")
        if encoding not in (None, "float", "base64"):
            raise fields.wrong("encoding_format", "float or base64")
        if fields.flag(body, "stream"):
            raise fields.wrong("stream", "left out: embeddings are not streamed")
        bias = fields.logit_bias(body)  # it changes nothing here, but a control token in it is refused as everywhere
        return ModelRequest(
            wire_format=self.wire_format,
            model=fields.model_name(body),
            payload=Embedding(
                inputs=_parse_input(body.get("input")),
                dimensions=fields.integer(body, "dimensions", low=1, high=16384),
            ),
            sampling={"encoding_format": encoding or "float"} | ({"logit_bias": bias} if bias else {}),
        )

    def reply(self, request: ModelRequest, request_id: str, created_s: int) -> EmbeddingReply:
        """Return a writer for the answer."""
        return EmbeddingReply(request)

    def problem(self, problem: Problem, request_id: str) -> bytes:
        """Return the error body."""
        return problem.openai_bytes()


class EmbeddingReply:
    """Writes a list of vectors; this format has no stream."""

    def __init__(self, request: ModelRequest) -> None:
        self._request = request
        self._base64 = request.sampling.get("encoding_format") == "base64"

    def begin(self, prompt_tokens: int) -> bytes:
        """Return nothing: there is no stream."""
        return b""

    def events(self, deltas: list[Delta]) -> bytes:
        """Return nothing: there is no stream."""
        return b""

    def end(self, last: list[Delta], outcome: Outcome) -> bytes:
        """Return nothing: there is no stream."""
        return b""

    def heartbeat(self) -> bytes:
        """Return nothing: there is no stream."""
        return b""

    def error(self, problem: Problem) -> bytes:
        """Return the error body."""
        return problem.openai_bytes()

    def whole(self, deltas: list[Delta], outcome: Outcome) -> bytes:
        """Return the plain body."""
        vectors = sorted((d.index, d.embedding) for d in deltas if d.embedding is not None)
        data = [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if self._base64 else vector}
            for index, vector in vectors
        ]
        num_tokens = outcome.usage.prompt_tokens
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return orjson.dumps({"object": "list", "data": data, "model": self._request.model, "usage": usage})


def _base64(vector: list[float]) -> str:
    """Return the vector as little-endian float32 in base64, as the SDKs decode it."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _parse_input(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not items or len(items) > MAX_INPUTS:
        raise fields.wrong("input", f"a string or a list of 1 to {MAX_INPUTS} strings")
    for item in items:
        if isinstance(item, int | list):
            raise RequestError(
                "'input' must be text: token ids are not accepted. In LangChain set check_embedding_ctx_length=False.",
                param="input",
                code="unsupported_content",
            )
        if not isinstance(item, str) or not item:
            raise fields.wrong("input", "made of non-empty strings")
    return tuple(items)
