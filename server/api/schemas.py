"""Bounds on the JSON schemas that callers send: what the engine's grammar compiler gets is small and plain."""

from __future__ import annotations

import re
from typing import Any

from server.errors import RequestError

MAX_NODES = 2000
MAX_DEPTH = 32
MAX_PATTERN_CHARS = 256
_TYPES = {"string", "number", "integer", "boolean", "object", "array", "null"}
# A quantified group that holds a quantifier: `(a+)+` backtracks exponentially in engines that backtrack.
_NESTED_QUANTIFIER = re.compile(r"\([^()]*[+*}][^()]*\)\s*[+*{]")

# A grammar compiler writes `a{60000}` out.
_LONG_REPEAT = re.compile(r"\{\d*,?\d*\d{4}")


def check_schema(schema: Any, param: str) -> None:
    """Check a JSON schema's size, depth, types, references and patterns.

    Raises:
        RequestError: It is not a schema, or passes a bound; `param` names the field.
    """
    if not isinstance(schema, dict):
        raise RequestError(f"'{param}' must be a JSON schema object.", param=param)
    num_nodes = 0
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        deeper: list[Any] = []
        for node in level:
            num_nodes += 1
            if isinstance(node, dict):
                _check_node(node, param)
                deeper.extend(v for v in node.values() if isinstance(v, dict | list))
            else:
                deeper.extend(v for v in node if isinstance(v, dict | list))
        if num_nodes > MAX_NODES:
            raise RequestError(f"'{param}' has more than {MAX_NODES} nodes; use a smaller schema.", param=param)
        if not deeper:
            return
        level = deeper
    raise RequestError(f"'{param}' is nested deeper than {MAX_DEPTH} levels.", param=param)


def _check_node(node: dict[str, Any], param: str) -> None:
    kind = node.get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    # `properties` may have a member called "type", whose value is then a schema and not a type name.
    if kind is not None and not isinstance(kind, dict) and not all(isinstance(k, str) and k in _TYPES for k in kinds):
        raise RequestError(f"'{param}' has a type that JSON Schema does not know.", param=param)
    reference = node.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        raise RequestError(f"'{param}' refers to another document; only '#/…' references are accepted.", param=param)
    pattern = node.get("pattern")
    if isinstance(pattern, str):
        _check_pattern(pattern, param)
    names = node.get("patternProperties")
    for name in names if isinstance(names, dict) else ():
        _check_pattern(name, param)


def _check_pattern(pattern: str, param: str) -> None:
    if len(pattern) > MAX_PATTERN_CHARS or _NESTED_QUANTIFIER.search(pattern) or _LONG_REPEAT.search(pattern):
        raise RequestError(
            f"'{param}' has a pattern that is longer than {MAX_PATTERN_CHARS} characters, repeats a repetition, or "
            "repeats something 1000 times or more.",
            param=param,
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as err:
        raise RequestError(f"'{param}' has a pattern that is not a regular expression.", param=param) from err
