"""Bounds on the JSON schemas that callers send: what the engine's grammar compiler gets is small and plain."""

from __future__ import annotations

import re
from typing import Any

import orjson

from server.errors import RequestError

MAX_NODES = 2000
MAX_DEPTH = 32
MAX_PATTERN_CHARS = 256
MAX_LITERAL_CHARS = 1024
MAX_LITERALS_CHARS = 32_768
"""Of names, `enum` and `const` together: the compiler makes a state of each character; 200,000 of them take minutes."""

MAX_TOOLS_CHARS = 2 * MAX_LITERALS_CHARS
"""The same of all tools of a request, which a forced choice compiles at once."""

MAX_UNTYPED = 128
"""Members that may be anything: 500 of them take the compiler half a minute, 1,000 several minutes."""

_TYPES = {"string", "number", "integer", "boolean", "object", "array", "null"}
_TYPED = frozenset({"type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf", "properties", "items", "pattern"})
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
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
    num_nodes = num_untyped = num_chars = 0
    level: list[tuple[Any, bool]] = [(schema, True)]
    for _ in range(MAX_DEPTH):
        deeper: list[tuple[Any, bool]] = []
        for node, is_schema in level:
            num_nodes += 1
            if isinstance(node, dict):
                _check_node(node, param)
                if is_schema:
                    num_untyped += sum(map(_is_untyped, _members(node)))
                    num_chars += sum(_count_literals(node, param))
            deeper += _children(node, is_schema=is_schema)
        if num_nodes > MAX_NODES:
            raise RequestError(f"'{param}' has more than {MAX_NODES} nodes; use a smaller schema.", param=param)
        if num_untyped > MAX_UNTYPED:
            raise RequestError(f"'{param}' leaves more than {MAX_UNTYPED} members without a type.", param=param)
        if num_chars > MAX_LITERALS_CHARS:
            raise RequestError(
                f"'{param}' has more than {MAX_LITERALS_CHARS} characters of names and fixed values.", param=param
            )
        if not deeper:
            return
        level = deeper
    raise RequestError(f"'{param}' is nested deeper than {MAX_DEPTH} levels.", param=param)


def check_tools(tools: tuple[dict[str, Any], ...]) -> None:
    """Check what the schemas of a request's tools come to together; each has passed `check_schema`.

    Raises:
        RequestError: They pass the bound.
    """
    if len(orjson.dumps(tools)) <= MAX_TOOLS_CHARS:  # as for nearly every request
        return
    num_chars = 0
    level: list[tuple[Any, bool]] = [(tool["function"]["parameters"], True) for tool in tools]
    while level:
        num_chars += sum(
            sum(_count_literals(node, "tools")) for node, is_schema in level if is_schema and isinstance(node, dict)
        )
        level = [child for node, is_schema in level for child in _children(node, is_schema=is_schema)]
    if num_chars > MAX_TOOLS_CHARS:
        raise RequestError(
            f"'tools' have more than {MAX_TOOLS_CHARS} characters of names and fixed values together; send fewer.",
            param="tools",
        )


def _children(node: Any, *, is_schema: bool) -> list[tuple[Any, bool]]:
    """Return what lies in a node, each with whether it is a schema; else it maps names, the caller's, to schemas."""
    if not isinstance(node, dict):
        return [(value, True) for value in node if isinstance(value, dict | list)]
    return [
        (value, not (is_schema and name in _MAPS)) for name, value in node.items() if isinstance(value, dict | list)
    ]


def _members(node: dict[str, Any]) -> list[Any]:
    """Return the schemas of a node that stand side by side."""
    found: list[Any] = []
    for name in _MAPS:
        if isinstance(members := node.get(name), dict):
            found += members.values()
    for name in _LISTS:
        if isinstance(members := node.get(name), list):
            found += members
    return found


def _is_untyped(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return True  # `true`, or `false`
    kind = schema.get("type")
    return not schema.keys() & _TYPED or (isinstance(kind, list) and len(kind) > 3)


def _count_literals(node: dict[str, Any], param: str) -> list[int]:
    literals = [node["const"]] if "const" in node else []
    for name, kind in (("enum", list), ("properties", dict)):
        if isinstance(values := node.get(name), kind):
            literals += values
    sizes = [1 + len(value if isinstance(value, str) else str(value)) for value in literals]
    if max(sizes, default=0) > MAX_LITERAL_CHARS:
        raise RequestError(
            f"'{param}' has a name or a fixed value of more than {MAX_LITERAL_CHARS} characters.", param=param
        )
    return sizes


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
