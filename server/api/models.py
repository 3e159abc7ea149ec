"""`GET /v1/models` and `/v1/models/{id}`, in OpenAI's form, or Anthropic's where its version header is sent."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from server.registry.served import ServedModel

_STARTED_S = int(time.time())


def openai_model(name: str, model: ServedModel) -> dict[str, Any]:
    """Return one model in OpenAI's form, with the length that Continue and others read; no path on disk."""
    return {
        "id": name,
        "object": "model",
        "created": _STARTED_S,
        "owned_by": "strongroom",
        "max_model_len": model.engine.max_model_len,
        "context_length": model.engine.max_model_len,
    }


def anthropic_model(name: str, model: ServedModel) -> dict[str, Any]:
    """Return one model in Anthropic's form."""
    created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_STARTED_S))
    return {
        "type": "model",
        "id": name,
        "display_name": name,
        "created_at": created,
        "lifecycle": "active",
        "max_input_tokens": model.engine.max_model_len,
    }


def list_models(named: Iterable[tuple[str, ServedModel]], *, anthropic: bool) -> dict[str, Any]:
    """Return the list in either form."""
    pairs = list(named)
    if anthropic:
        data = [anthropic_model(name, model) for name, model in pairs]
        return {
            "data": data,
            "has_more": False,
            "first_id": pairs[0][0] if pairs else None,
            "last_id": pairs[-1][0] if pairs else None,
        }
    return {"object": "list", "data": [openai_model(name, model) for name, model in pairs]}
