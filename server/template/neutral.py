"""Makes client text harmless for an engine that renders by itself, in a way that the answer can be turned back.

A remote engine takes messages, not token ids, and its tokenizer is not ours: there control tokens in client text would
become control tokens. A mark, a private-use character that no client string holds, is put behind the first character of
whatever is spelled like a control token of a known kind. The model reads the text with the mark in it; the mark is
taken out of the answer, so what it quotes comes back as it was sent. Local engines get exact prompts (`render.py`).
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from server.template.conversation import assemble, choose_mark, map_tools, map_turns
from server.types import Conversation

if TYPE_CHECKING:
    from server.types import Chat

# Names between plain angle brackets that the known families use; other tags are left alone, they are HTML or generics.
_NAMES = (
    r"s|bos|eos|pad|unk|mask|cls|sep|image|start_of_turn|end_of_turn|start_of_image|end_of_image|tool_call|tool_response|"
    r"tool_calls|tools|think|fim_prefix|fim_suffix|fim_middle|fim_pad|fim-prefix|fim-suffix|fim-middle|PRE|SUF|MID|EOT|"
    r"repo_name|reponame|file_sep|filename|gh_stars|issue_start|issue_comment|issue_closed|jupyter_\w+|empty_output|"
    r"commit_before|commit_msg|commit_after|pr\w*|extra_id_\d+|unused\d+|reserved\w*|SPECIAL_\d+|endoftext|startoftext|"
    r"system|user|assistant|bot|human|end|eod|function_calls|function_call|start_of_role|end_of_role|end_of_text"
)
_RISKY = re.compile(
    rf"<(?=[|｜])|<(?=<SYS>>)|<(?=/(?:<SYS>>)?)(?=/(?:{_NAMES}|<SYS>)>)|<(?=(?:{_NAMES})>)|<(?=\s*\Z)|"
    r"\[(?=/?[A-Z][A-Z_]{1,30}\])|\[(?=@)|\[(?=\s*\Z)|(?<=\|)(?=>)|(?<=｜)(?=>)|\A(?=\s*[|｜/])",
)


def neutralise(chat: Chat, block: str) -> Conversation:
    """Return the conversation with the security block first and every client string neutralised.

    Args:
        chat: The client's conversation.
        block: The composed security template.

    Raises:
        RequestError: A role outside the closed set, or a text that holds every character that could serve as mark.
    """
    turns = assemble(chat, block, splits_reasoning=False)
    tools = list(chat.tools)
    mark = choose_mark([*turns, *tools])
    system = turns[0]["content"] if turns[0]["role"] == "system" else ""
    safe = map_turns(turns, lambda text: neutralise_text(text, mark))
    if block and system:
        safe[0]["content"] = block + neutralise_text(system[len(block) :], mark)
    for turn in safe:
        for call in turn.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    safe_tools = map_tools(tools, lambda text: neutralise_text(text, mark))
    used = safe != turns or safe_tools != tools
    return Conversation(safe, safe_tools, mark if used else "")


def neutralise_text(text: str, mark: str) -> str:
    """Return `text` with the mark behind the first character of each spelling of a control token."""
    return _RISKY.sub(lambda match: match[0] + mark, text)
