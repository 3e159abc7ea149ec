"""Renders a conversation to exact token ids: a template may write control tokens, a client never can.

1. A mark, a private-use character that no client string holds, is put inside each spelling of a control token in client
   text. The chat template then works on text that looks as it always does, but no control token can come of it.
2. The rendered text is split at the control tokens that are left; marks are taken out; the text between is encoded by a
   tokenizer that knows no control tokens.
3. The control tokens must be those of the same conversation with neutral words in every client string, and the security
   block must stand where it stands there. A template that builds a control token out of client text all the same (from
   parts, by changing case) is caught here: once more with marks around every string, then 400.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from server.errors import ConfigError, RequestError
from server.template.conversation import MARKS, NEUTRAL, assemble, choose_mark, is_identifier, map_tools, map_turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.template.chat_template import ChatTemplate
    from server.template.vocabulary import Vocabulary
    from server.types import Chat

MAX_SHAPES = 4096
MAX_TOOL_SETS = 64
_PROBE = "Keep to the rules of this house, point by point."


@dataclass(frozen=True, slots=True)
class _ToolSet:
    """A request's tools made ready once: agents send the same ones with every turn."""

    guarded: list[dict[str, Any]]
    neutral: list[dict[str, Any]]
    marks: frozenset[str]
    digest: str


class ChatRenderer:
    """Renders conversations for one model.

    Args:
        vocabulary: The model's tokenizer.
        template: The model's chat template.
        accept_shared_turn: Serve a model whose template puts system text at the head of the first user turn. The policy
            then still stands first, but in one turn with client text.

    Raises:
        ConfigError: The chat template does not put the system turn first, or the tokenizer can't be matched exactly.
    """

    def __init__(self, vocabulary: Vocabulary, template: ChatTemplate, *, accept_shared_turn: bool = False) -> None:
        self._vocabulary = vocabulary
        self._template = template
        if any(mark in template.source or vocabulary.is_part(mark) for mark in (*MARKS, NEUTRAL)):
            raise ConfigError(
                "The chat template or a control token holds private-use characters that the server needs for itself "
                "(U+F8D0 to U+F8E0)."
            )
        self._shapes: OrderedDict[tuple[str, str], tuple[list[int], int]] = OrderedDict()
        self._tool_sets: OrderedDict[tuple[str, bytes], _ToolSet] = OrderedDict()
        self.supports_tools = True
        self._verify_order(accept_shared_turn=accept_shared_turn)

    def render(self, chat: Chat, block: str, *, space: str = "") -> tuple[str, list[int]]:
        """Return the prompt's text and token ids.

        Args:
            chat: The client's conversation.
            block: The security template, composed and stripped; it comes first in the one system turn.
            space: Cache partition, the tenant.

        Raises:
            RequestError: The conversation can't be rendered, or not without a control token of the client's making.
        """
        turns = assemble(chat, block, splits_reasoning=self._template.reads_reasoning)
        tools = list(chat.tools) or None
        if tools and not self.supports_tools:
            raise RequestError(
                "This model's chat template writes tools before the security policy, so tools can't be used with it.",
                param="tools",
                code="tools_unsupported",
            )
        tool_set = self._prepare(tools, space) if tools else None
        mark = choose_mark(turns, tool_set.marks if tool_set else frozenset())
        wanted, offset = self._expect(turns, tool_set, block)

        def guard(text: str) -> str:
            return self._vocabulary.guard(text, mark)

        for change in (guard, lambda text: self._wrap(text, mark)):
            if tool_set is not None and mark == MARKS[0] and change is guard:
                guarded_tools: list[dict[str, Any]] | None = tool_set.guarded
            else:
                guarded_tools = map_tools(tools, change) if tools else None
            text = self._template.render(self._guard_turns(turns, block, change), guarded_tools)
            pieces = self._vocabulary.split(text)
            if [piece for piece in pieces if isinstance(piece, int)] == wanted:
                break
        else:
            raise RequestError(
                "A control token of this model would come of the text that was sent. Write its name in another way.",
                param="messages",
                code="control_token",
            )
        if mark in text:
            text = text.replace(mark, "")
            pieces = [piece if isinstance(piece, int) else piece.replace(mark, "") for piece in pieces]
        if not text.startswith(block, offset):
            # A date that the template writes before the block may have changed its length since this shape was kept.
            offset = self._expect(turns, tool_set, block, afresh=True)[1]
        if not text.startswith(block, offset):
            raise _not_first()
        return text, self._vocabulary.encode_pieces([p for p in pieces if p != ""], space)

    def _guard_turns(
        self, turns: list[dict[str, Any]], block: str, change: Callable[[str], str]
    ) -> list[dict[str, Any]]:
        """Change client text only: in the system turn, what follows the block."""
        if not block or turns[0]["role"] != "system":
            return map_turns(turns, change)
        content = turns[0]["content"]
        system = content if len(content) == len(block) else block + change(content[len(block) :])
        return [{**turns[0], "content": system}, *map_turns(turns[1:], change)]

    def _wrap(self, text: str, mark: str) -> str:
        return f"{mark}{self._vocabulary.guard(text, mark)}{mark}" if text.strip() else text

    def _prepare(self, tools: list[dict[str, Any]], space: str) -> _ToolSet:
        content = _to_bytes(tools)
        key = (space, content)
        found = self._tool_sets.get(key)
        if found is None:
            text = content.decode("utf-8", "surrogatepass")
            found = _ToolSet(
                guarded=map_tools(tools, lambda text: self._vocabulary.guard(text, MARKS[0])),
                neutral=map_tools(tools, self._neutralise),
                marks=frozenset(mark for mark in MARKS if mark in text),
                digest=hashlib.sha256(content).hexdigest(),
            )
            self._tool_sets[key] = found
            if len(self._tool_sets) > MAX_TOOL_SETS:
                self._tool_sets.popitem(last=False)
        return found

    def _expect(
        self, turns: list[dict[str, Any]], tools: _ToolSet | None, block: str, *, afresh: bool = False
    ) -> tuple[list[int], int]:
        """Return the control ids and the block's place of this conversation with neutral words for client text."""
        neutral = [{**turn, "content": NEUTRAL if turn["content"].strip() else turn["content"][:1]} for turn in turns]
        rich = tools is not None or any(len(turn) > 2 for turn in turns)
        if rich:
            neutral = map_turns(neutral, self._neutralise)
            shape = hashlib.sha256(_to_bytes([neutral, tools.digest if tools else ""])).hexdigest()
        else:
            shape = "".join(turn["role"][0] + (turn["content"] or "-") for turn in neutral)
        key = (block, shape)
        found = None if afresh else self._shapes.get(key)
        if found is None:
            if block:
                neutral[0]["content"] = block
            text = self._template.render(neutral, tools.neutral if tools else None)
            controls = [piece for piece in self._vocabulary.split(text) if isinstance(piece, int)]
            place = text.find(block)
            if place < 0 or NEUTRAL in text[:place]:
                raise _not_first()
            found = controls, place
            self._shapes[key] = found
            if len(self._shapes) > MAX_SHAPES:
                self._shapes.popitem(last=False)
        return found

    def _neutralise(self, text: str) -> str:
        """Keep what a template may ask for (short plain names); replace whatever could be part of a control token."""
        vocabulary = self._vocabulary
        if not text.strip():
            return text
        if is_identifier(text) and not vocabulary.is_part(text) and vocabulary.guard(text, MARKS[0]) is text:
            return text
        return NEUTRAL * min(len(text), 64)

    def _verify_order(self, *, accept_shared_turn: bool) -> None:
        """Render known conversations: system text comes first, in a turn of its own; ids are the tokenizer's own.

        Raises:
            ConfigError: They don't.
        """
        user, other, answer = (
            {"role": r, "content": f"probe {r} {n}"} for r, n in (("user", 1), ("user", 2), ("assistant", 3))
        )
        for turns in ([user, answer, other], [user]):
            try:
                text = self._template.render([{"role": "system", "content": _PROBE}, *turns], None)
            except RequestError as err:
                raise ConfigError(
                    f"The model's chat template takes no system turn ({err}), so the security policy can't be "
                    "enforced. Give the model a chat template that puts a system turn first."
                ) from err
            at, client = text.find(_PROBE), text.find("probe ")
            if text.count(_PROBE) != 1 or client < at:
                raise ConfigError(
                    "The model's chat template does not put the system turn first, so the security policy would come "
                    "after client text. Give the model a chat template that puts a system turn first."
                )
            between = self._vocabulary.split(text[at:client])
            if not accept_shared_turn and not any(isinstance(piece, int) for piece in between):
                raise ConfigError(
                    "The model's chat template puts system text and client text into one turn. Give the model a "
                    "chat template with a system turn of its own, or accept a shared first turn for this model."
                )
            self._vocabulary.verify_exact(text)
        tool = {"type": "function", "function": {"name": "probe_tool", "description": "Probe tool", "parameters": {}}}
        try:
            text = self._template.render([{"role": "system", "content": _PROBE}, user], [tool])
        except RequestError:
            self.supports_tools = False
        else:
            named = text.find("probe_tool")
            self.supports_tools = named < 0 or named > text.find(_PROBE)


def _not_first() -> RequestError:
    return RequestError(
        "The security policy would not stand first in this conversation. Simplify its roles and tools.",
        param="messages",
        code="conversation_refused",
    )


def _to_bytes(value: Any) -> bytes:
    """Return JSON of what a JSON body gave, marks unescaped.

    Raises:
        RequestError: Nested too deep.
    """
    try:
        return orjson.dumps(value)
    except TypeError:  # integers beyond 64 bits
        try:
            return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        except RecursionError as err:
            raise RequestError("Tools and arguments are nested too deep.", param="tools", code="too_deep") from err
