"""Fill in the middle as Mistral says it (`/v1/fim/completions`): prompt and suffix in, chat-shaped choices out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from server.api import fields
from server.api.chat import ChatReply
from server.api.completions import parse_prompt, parse_suffix
from server.types import Completion, ModelRequest, WireFormat

if TYPE_CHECKING:
    from server.api.problems import Problem


class FIMFormat:
    """`POST /v1/fim/completions`."""

    wire_format = WireFormat.FIM
    action = "model:fim:create"

    def parse(self, body: dict[str, Any]) -> ModelRequest:
        """Return the pipeline's request.

        Raises:
            RequestError: A field is wrong or refused, by name.
        """
        fields.refuse(body)
        return ModelRequest(
            wire_format=self.wire_format,
            model=fields.model_name(body),
            payload=Completion(prompt=parse_prompt(body.get("prompt")), suffix=parse_suffix(body.get("suffix")) or ""),
            sampling=fields.sampling(body),
            max_tokens=fields.max_tokens(body, "max_tokens"),
            stream=fields.flag(body, "stream"),
            include_usage=True,
        )

    def reply(self, request: ModelRequest, request_id: str, created_s: int) -> ChatReply:
        """Return a writer for the answer: Mistral's stream has chat-shaped deltas."""
        return ChatReply(request, "fim-" + request_id.removeprefix("req_"), created_s)

    def problem(self, problem: Problem, request_id: str) -> bytes:
        """Return the error body."""
        return problem.openai_bytes()
