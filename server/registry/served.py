"""The models behind the address: each with its engine, tokenizer and limits, found by id or alias."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.errors import ContextLengthError, ModelNotFoundError, RequestError
from server.types import Chat, Completion, Embedding

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from server.ports import Engine, PromptRenderer
    from server.settings import ModelSettings
    from server.types import Delta, ModelRequest, Obligations, Principal, Prompt, RequestId, TenantId

INLINE_CHARS = 16 * 1024
"""Texts up to this are tokenized on the event loop: it takes less than 5 ms, a thread hop costs about 0.1 ms."""

MIN_ANSWER_TOKENS = 1


def text_chars(request: ModelRequest) -> int:
    """Return roughly how many characters a request brings; for choosing where to work, not for limits."""
    match request.payload:
        case Chat(messages=messages, tools=tools):
            return sum(map(_string_chars, messages)) + sum(map(_string_chars, tools))
        case Completion(prompt=prompt, suffix=suffix):
            return len(prompt) + len(suffix or "")
        case Embedding(inputs=inputs):
            return sum(map(len, inputs))


def _string_chars(value: Any) -> int:
    """Return the length of all strings in a JSON value, names too: a tool's schema may be the largest text of all."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _string_chars(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(map(_string_chars, value))
    return 8


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model as the pipeline sees it; implements `ports.Model`.

    `digest` is the sealed core's digest in hex; `control_ids` are the vocabulary's control tokens.
    """

    settings: ModelSettings
    digest: str
    signed: bool
    engine: Engine
    renderer: PromptRenderer
    control_ids: frozenset[int]
    cache_salt: Callable[[TenantId], str]

    @property
    def id(self) -> str:
        """The model's id."""
        return self.settings.id

    async def render(self, request: ModelRequest, obligations: Obligations, principal: Principal) -> Prompt:
        """Return the prompt; long texts are rendered in a thread.

        Raises:
            RequestError: The text can't be rendered without control tokens of the client's making.
        """
        self._check_fit(request)
        if text_chars(request) <= INLINE_CHARS:
            return self.renderer.render(request, obligations, principal)
        return await asyncio.to_thread(self.renderer.render, request, obligations, principal)

    def clamp(self, request: ModelRequest, prompt: Prompt, obligations: Obligations) -> int:
        """Return how many tokens the answer may have: the least of asked, permitted and left.

        Raises:
            ContextLengthError: The prompt alone does not fit.
        """
        limit = self.engine.max_model_len
        num_prompt = len(prompt.token_ids)
        if isinstance(request.payload, Embedding):
            longest = max(map(len, prompt.inputs), default=0)
            if longest > limit:
                raise ContextLengthError(limit_tokens=limit, prompt_tokens=longest)
            return 0
        left = limit - num_prompt
        if left < MIN_ANSWER_TOKENS:
            raise ContextLengthError(limit_tokens=limit, prompt_tokens=num_prompt)
        return min(left, request.max_tokens or left, obligations.max_tokens or left)

    def describe(self, request: ModelRequest, max_tokens: int) -> dict[str, Any]:
        """Return what the audit record says of model and parameters; numbers and names, no texts."""
        effective = {name: value for name, value in request.sampling.items() if name not in ("stop", "logit_bias")}
        effective["stop_strings"] = len(request.sampling.get("stop", ()))
        return {
            "model": self.id,
            "model_digest": self.digest,
            "stage": self.settings.stage,
            "max_tokens": max_tokens,
            "stream": request.stream,
            "params": effective,
        }

    def stream(
        self, prompt: Prompt, request: ModelRequest, *, max_tokens: int, principal: Principal, request_id: RequestId
    ) -> AsyncGenerator[list[Delta], None]:
        """Return the engine's answer, its prefix cache salted with the tenant's own salt."""
        salt = self.cache_salt(principal.tenant)
        return self.engine.stream(prompt, request, max_tokens=max_tokens, cache_salt=salt, request_id=request_id)

    def _check_fit(self, request: ModelRequest) -> None:
        pooling = self.settings.engine.runner == "pooling"
        if pooling != isinstance(request.payload, Embedding):
            use = "embeddings only" if pooling else "text generation only"
            raise RequestError(
                f"The model '{self.id}' serves {use}; choose another model or route.",
                param="model",
                code="model_not_supported",
            )
        for token in request.sampling.get("logit_bias", ()):
            if int(token) in self.control_ids:
                raise RequestError(
                    f"'logit_bias' may not touch the control token {token}.",
                    param="logit_bias",
                    code="unsupported_parameter",
                )


class ModelRegistry:
    """All served models; implements `ports.Models`."""

    def __init__(self, models: tuple[ServedModel, ...]) -> None:
        self.models = models
        self._by_name = {name: model for model in models for name in (model.id, *model.settings.aliases)}

    def id_of(self, name: str) -> str | None:
        """Return the id of the model of this id or alias; None where there is none."""
        model = self._by_name.get(name)
        return None if model is None else model.id

    def find(self, name: str) -> ServedModel:
        """Return the model of this id or alias.

        Raises:
            ModelNotFoundError: There is none.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise ModelNotFoundError(
                f"The model {name[:80]!r} does not exist or you may not use it; GET /v1/models lists what there is.",
                param="model",
            ) from None
