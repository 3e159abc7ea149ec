"""Remote engines render by themselves: neutralised messages make no control token there, and turn back unchanged."""

from __future__ import annotations

import itertools
import json
import warnings
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from server.engine.wire import without_mark
from server.errors import RequestError
from server.template.neutral import neutralise, neutralise_text
from server.types import Chat, Delta
from tests.vectors.template.families import FAMILIES, Family

BLOCK = "## Rules\nFollow them."
MARK = "\uf8d0"
# The single-word token of the flags family is made up; no remote vocabulary has it.
REMOTE = [f for f in FAMILIES if f.name != "flags"]


def stock(family: Family) -> Any:
    from transformers import PreTrainedTokenizerFast

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend = Tokenizer.from_str(family.files()["tokenizer.json"].decode())
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=family.template, **family.config)


def controls_of(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[int]:
    ids = tokenizer.apply_chat_template(messages, tools=tools or None, add_generation_prompt=True)["input_ids"]
    # A vocabulary without byte pieces reads our mark as unknown; that shapes no turn.
    added = {
        number
        for number, token in tokenizer.added_tokens_decoder.items()
        if (token.special or token.content.startswith("<")) and token.content != "<unk>"
    }
    return [i for i in ids if i in added]


@pytest.mark.parametrize("family", REMOTE, ids=lambda f: f.name)
def test_forged_turns_stay_text_under_stock_rendering(family: Family):
    tokenizer = stock(family)
    html = {"<table>", "</table>", "<code>", "</code>", "<h1>", "</h1>", "<ul>", "<b>", "<sub>"}
    plain = [t if isinstance(t, str) else t.content for t in family.plain]
    tokens = [t for t in (*family.special[:20], *plain) if len(t) > 2 and t.strip(" \n▁") and t not in html]

    def chat(text: str) -> Chat:
        tool = {"type": "function", "function": {"name": "f", "description": text, "parameters": {}}}
        turns: tuple[dict[str, Any], ...] = (
            {"role": "user", "content": text},
            {"role": "assistant", "content": text},
            {"role": "system", "content": text},
            {"role": "user", "content": text},
        )
        return Chat(turns, (tool,) if family.tools else ())

    def controls(text: str) -> list[int]:
        remote = neutralise(chat(text), BLOCK)
        return controls_of(tokenizer, remote.messages, remote.tools)

    wanted = controls("words")
    for attack in (family.forge, " ".join(tokens), "".join(tokens), *tokens[:24]):
        assert controls(attack) == wanted, attack
    for token in tokens[:6]:
        for cut in range(1, len(token)):
            assert controls(token[cut:] + " x " + token[:cut]) == wanted


def test_block_stands_first_and_is_untouched():
    remote = neutralise(Chat(({"role": "user", "content": "x"}, {"role": "system", "content": "<|im_end|>"})), BLOCK)
    assert remote.messages[0]["content"].startswith(BLOCK + "\n\n## Preferences")
    assert "<|im_end|>" not in remote.messages[0]["content"]
    assert [m["role"] for m in remote.messages] == ["system", "user"]


def test_tool_arguments_stay_json():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "<|im_end|>"}'}}
    chat = Chat(({"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}))
    remote = neutralise(chat, BLOCK)
    sent = remote.messages[2]["tool_calls"][0]["function"]["arguments"]
    assert json.loads(sent.replace(remote.mark, "")) == {"a": "<|im_end|>"}


def test_ordinary_code_is_not_marked():
    code = "List<String> a = b[i] < c ? x : y; <div class='a'></div> [TODO] m[KEY_A] <b>bold</b> a || b |> c"
    marked = neutralise_text(code, MARK)
    assert marked.replace(MARK, "") == code
    assert "List<String> a = b[i] < c" in marked
    assert "<div class='a'></div>" in marked


def test_every_mark_in_client_text_is_refused():
    with pytest.raises(RequestError, match="private-use"):
        neutralise(Chat(({"role": "user", "content": "".join(map(chr, range(0xF8D0, 0xF8E0)))},)), BLOCK)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=st.lists(st.sampled_from(["<|", "|>", "im_end", "</s>", "[INST]", "<", "[", "x", " ", "\n", "｜", "é"])).map(
        "".join
    ),
    cuts=st.lists(st.integers(0, 60), max_size=5),
)
def test_an_answer_that_quotes_comes_back_unchanged_in_any_pieces(text: str, cuts: list[int]):
    marked = neutralise_text(text, MARK)
    edges = sorted({0, len(marked), *(c for c in cuts if c < len(marked))})
    pieces = [without_mark(Delta(text=marked[a:b]), MARK).text for a, b in itertools.pairwise(edges)]
    assert "".join(pieces) == text
