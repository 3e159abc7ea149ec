"""Runs a model's own chat template in a sandbox, with the extras that published templates use."""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from typing_extensions import override

from server.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from jinja2.parser import Parser

MAX_TEMPLATE_CHARS = 256 * 1024
_ESCAPES = re.compile(r"ensure_ascii\s*=\s*(?![Ff]alse)|\burlencode\b")


class ChatTemplate:
    """One model's chat template, compiled once.

    Args:
        source: A Jinja template, or named ones of which `default` and `tool_use` are known.
        special_tokens: What the template may write by name (`bos_token`, …).
        now: The clock behind `strftime_now`.

    Raises:
        ConfigError: The template can't be parsed, or escapes text in a way that would hide the marks of client text.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        now: Callable[[], datetime] | None = None,
    ) -> None:
        sources = {"default": source} if isinstance(source, str) else dict(source)
        if "default" not in sources:
            raise ConfigError("The chat template has no part named 'default'. Give the model's chat_template.jinja.")
        for text in sources.values():
            if len(text) > MAX_TEMPLATE_CHARS:
                raise ConfigError(f"The chat template has {len(text)} characters; the limit is {MAX_TEMPLATE_CHARS}.")
            if _ESCAPES.search(text):
                raise ConfigError("The chat template escapes characters, which would hide where client text begins.")
        self.source = "\0".join(sources.values())
        self.reads_reasoning = "</think>" in self.source and "reasoning_content" in self.source
        env = _new_environment(now or (lambda: datetime.now().astimezone()))
        try:
            self._default = env.from_string(sources["default"])
            self._tool_use = env.from_string(sources.get("tool_use", sources["default"]))
        except TemplateSyntaxError as err:
            raise ConfigError(f"The chat template can't be parsed: {err.message} (line {err.lineno}).") from err
        self._special_tokens = dict(special_tokens)

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        """Return the rendered conversation, ready for the assistant's answer.

        Raises:
            RequestError: The template refuses this conversation.
        """
        template = self._tool_use if tools else self._default
        try:
            return template.render(
                messages=messages, tools=tools, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except (TemplateError, TypeError, ValueError, LookupError, RecursionError) as err:
            reason = err.message if isinstance(err, _RefusalError) else type(err).__name__
            raise RequestError(
                f"The model's chat template refuses this conversation: {str(reason)[:200]}. "
                "Check the order of roles and what the messages hold.",
                param="messages",
                code="conversation_refused",
            ) from err


def load_source(path: Path) -> str:
    """Return a chat template that the operator gives in place of the model's own.

    Raises:
        ConfigError: The file can't be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"The chat template {path} can't be read. Mend the model's chat_template setting.") from err


class _RefusalError(TemplateError):
    """The template called `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads this class attribute

    @override
    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return the body's nodes unchanged."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _new_environment(now: Callable[[], datetime]) -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], autoescape=False
    )

    def raise_exception(message: str) -> None:
        raise _RefusalError(message)

    def strftime_now(form: str) -> str:
        return now().strftime(form)

    env.filters["tojson"] = _to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without HTML escaping, as the published templates expect."""
    if isinstance(value, Undefined):
        raise _RefusalError("a value to be written as JSON is missing")
    if ensure_ascii:
        raise _RefusalError("the template escapes characters, which would hide where client text begins")
    return json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
