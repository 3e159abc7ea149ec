"""Checks of single request fields that several wire formats share; each raises a 400 that names the field."""

from __future__ import annotations

import re
from typing import Any

from server.api.refused import HARMLESS, REFUSED_FIELDS
from server.errors import RequestError

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 512
MAX_CHOICES = 8
MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_MODEL_CHARS = 128
MAX_MESSAGES = 4096
MAX_TOOLS = 256
NAME = re.compile(r"^[A-Za-z0-9_.\-/:]{1,128}$")


def wrong(param: str, expected: str) -> RequestError:
    """Return the 400 that says what `param` should have been."""
    return RequestError(f"'{param}' must be {expected}.", param=param)


def text(body: dict[str, Any], name: str, *, max_chars: int) -> str:
    """Return a required, non-empty string field."""
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise wrong(name, "a non-empty string")
    if len(value) > max_chars:
        raise wrong(name, f"at most {max_chars} characters")
    return value


def model_name(body: dict[str, Any]) -> str:
    """Return the `model` field."""
    return text(body, "model", max_chars=MAX_MODEL_CHARS)


def flag(body: dict[str, Any], name: str, *, default: bool = False) -> bool:
    """Return an optional true or false."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong(name, "true or false")
    return value


def integer(body: dict[str, Any], name: str, *, low: int, high: int, param: str | None = None) -> int | None:
    """Return an optional whole number between two bounds, both included."""
    value = body.get(name)
    if value is None:
        return None
    # bool is an int in Python and 1.0 a float in JSON: neither is a whole number on the wire.
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise wrong(param or name, f"a whole number from {low} to {high}")
    return value


def number(body: dict[str, Any], name: str, *, low: float, high: float) -> float | None:
    """Return an optional number between two bounds, both included."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise wrong(name, f"a number from {low:g} to {high:g}")
    return float(value)


def max_tokens(body: dict[str, Any], *names: str) -> int | None:
    """Return the first of the fields that is set; values above any context are fine, the pipeline clamps."""
    for name in names:
        value = integer(body, name, low=1, high=2**31)
        if value is not None:
            return value
    return None


def stop_strings(body: dict[str, Any], name: str = "stop") -> list[str]:
    """Return `stop` as a list of bounded, non-empty strings."""
    value = body.get(name)
    if value is None:
        return []
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or len(items) > MAX_STOP_STRINGS:
        raise wrong(name, f"a string or a list of at most {MAX_STOP_STRINGS} strings")
    for item in items:
        if not isinstance(item, str) or len(item) > MAX_STOP_CHARS:
            raise wrong(name, f"made of strings of at most {MAX_STOP_CHARS} characters")
    return [item for item in items if item]


def sampling(body: dict[str, Any]) -> dict[str, Any]:
    """Return the sampling fields that the wire formats share, checked, ready for the engine."""
    found: dict[str, Any] = {
        "temperature": number(body, "temperature", low=0, high=2),
        "top_p": number(body, "top_p", low=0, high=1),
        "top_k": integer(body, "top_k", low=-1, high=1_000_000),
        "min_p": number(body, "min_p", low=0, high=1),
        "frequency_penalty": number(body, "frequency_penalty", low=-2, high=2),
        "presence_penalty": number(body, "presence_penalty", low=-2, high=2),
        "repetition_penalty": number(body, "repetition_penalty", low=0.01, high=10),
        "seed": integer(body, "seed", low=-(2**63), high=2**63 - 1),
        "n": integer(body, "n", low=1, high=MAX_CHOICES),
    }
    if found["top_p"] == 0:
        found["top_p"] = 1e-6  # OpenAI takes 0 for "the likeliest"; vLLM wants more than 0
    if found["top_k"] == 0:
        found["top_k"] = -1
    found["logit_bias"] = logit_bias(body)
    stop = stop_strings(body)
    if stop:
        found["stop"] = stop
    return {name: value for name, value in found.items() if value is not None}


def logit_bias(body: dict[str, Any]) -> dict[str, float] | None:
    """Return `logit_bias` as token id to bias."""
    value = body.get("logit_bias")
    if value is None or value in ({}, []):
        return None
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise wrong("logit_bias", f"an object of at most {MAX_LOGIT_BIAS} token ids")
    for key, bias in value.items():
        is_id = key.isascii() and key.isdigit() and len(key) <= 9  # "²" is a digit to Python and no number
        if not is_id or isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise wrong("logit_bias", "an object from token ids to numbers from -100 to 100")
    return value


def stream_options(body: dict[str, Any]) -> bool:
    """Return whether the stream should end with a usage chunk."""
    value = body.get("stream_options")
    if value is None:
        return False
    if not isinstance(value, dict):
        raise wrong("stream_options", "an object")
    return flag(value, "include_usage")


def refuse(body: dict[str, Any]) -> None:
    """Refuse by name the fields of `REFUSED_FIELDS`; a null or harmless value counts as absent.

    Raises:
        RequestError: One is there, with the reason.
    """
    for name in body.keys() & REFUSED_FIELDS.keys():
        value = body[name]
        if value is None or (name in HARMLESS and value is HARMLESS[name]) or value in ([], {}):
            continue
        raise RequestError(
            f"'{name}' is not accepted: {REFUSED_FIELDS[name]}", param=name, code="unsupported_parameter"
        )
