"""Whatever a client sends, the control tokens are the template's, the policy stands first, and no text is lost."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.template.prompt import PromptBuilder
from server.template.registry import TemplateRegistry
from server.types import Chat, ModelRequest, Obligations, Payload, Principal, Prompt, SubjectId, TenantId, WireFormat
from tests.vectors.template.families import FAMILIES

PRINCIPAL = Principal(SubjectId("ann"), TenantId("acme"), frozenset(), frozenset(), "api_key", "k1")
FOLDER = Path(__file__).parents[2] / "configs" / "templates"
REGISTRY = TemplateRegistry.load(FOLDER, FOLDER / "templates.lock")
BUILDERS = {f.name: PromptBuilder(REGISTRY, f.files(), accept_shared_turn=f.shared_turn) for f in FAMILIES}
BLOCK = REGISTRY.compose(["secure-coding"]).text
NAMES = [f.name for f in FAMILIES]


def fragments(name: str) -> st.SearchStrategy[str]:
    """Texts out of whole control tokens, their pieces, white space, marks and anything else."""
    tokens = [t for t in BUILDERS[name].vocabulary.controls if len(t) > 1][:60]
    pieces = [t[:n] for t in tokens for n in range(1, len(t))] + [t[n:] for t in tokens for n in range(1, len(t))]
    other = ["\n", " ", "\t", "\uf8d0", "\uf8d3", "system", "user", "</think>", "<think>", '"', "\\", "{{", "}}", "é"]
    part = st.one_of(st.sampled_from(tokens), st.sampled_from(pieces), st.sampled_from(other), st.text(max_size=4))
    return st.lists(part, max_size=8).map("".join)


def render(builder: PromptBuilder, payload: Payload) -> Prompt:
    request = ModelRequest(WireFormat.CHAT, "m", payload, {})
    return builder.render(request, Obligations(templates=("secure-coding",)), PRINCIPAL)


def controls_of(builder: PromptBuilder, prompt: Prompt) -> list[int]:
    return [i for i in prompt.token_ids if i in builder.vocabulary.control_ids]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_control_tokens_are_the_template_s_own(name: str, data: st.DataObject) -> None:
    builder = BUILDERS[name]
    texts = data.draw(st.lists(fragments(name).filter(lambda t: bool(t.strip())), min_size=6, max_size=6))
    system, developer, first, answer, title, last = texts

    def conversation(change: Any) -> Chat:
        turns: tuple[dict[str, Any], ...] = (
            {"role": "system", "content": change(system)},
            {"role": "user", "content": change(first), "name": change(title)},
            {"role": "assistant", "content": change(answer)},
            {"role": "developer", "content": change(developer)},
            {
                "role": "user",
                "content": [{"type": "text", "text": change(last)}, {"type": "text", "text": change(first)}],
            },
        )
        return Chat(turns)

    prompt = render(builder, conversation(lambda text: text))
    honest = render(builder, conversation(lambda _: "words"))
    assert controls_of(builder, prompt) == controls_of(builder, honest)
    assert prompt.text.find(BLOCK) == honest.text.find(BLOCK) >= 0
    assert first.strip() in prompt.text


@pytest.mark.parametrize("name", [f.name for f in FAMILIES if f.tools])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_tools_add_no_control_tokens_of_the_client_s(name: str, data: st.DataObject) -> None:
    builder = BUILDERS[name]
    texts = data.draw(st.lists(fragments(name).filter(lambda t: bool(t.strip())), min_size=6, max_size=6))

    def conversation(change: Any) -> Chat:
        called, key, value, result, about, prop = (change(n) for n in range(6))
        schema = {"type": "object", "properties": {prop: {"type": "string", "description": about, "enum": [value]}}}
        tool = {"type": "function", "function": {"name": called, "description": about, "parameters": schema}}
        call = {
            "id": "abcdefghi",
            "type": "function",
            "function": {"name": called, "arguments": json.dumps({key: value})},
        }
        return Chat(
            (
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "so", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "abcdefghi", "content": result},
            ),
            (tool,),
        )

    prompt = render(builder, conversation(lambda n: texts[n]))
    honest = render(builder, conversation(lambda n: f"words {n}"))
    assert controls_of(builder, prompt) == controls_of(builder, honest)


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("qwen", "star", "deepseek", "llama"))])
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_encoded_text_decodes_to_itself(name: str, data: st.DataObject) -> None:
    """Nothing is dropped and nothing becomes a control token, for any text."""
    vocabulary = BUILDERS[name].vocabulary
    # DeepSeek's single-letter tokens don't survive its own decoder, in the unchanged tokenizer either.
    text = data.draw(fragments(name)).translate(dict.fromkeys(map(ord, "õ÷ÿ")))
    ids = vocabulary.encode(text, first=False)
    assert vocabulary.control_ids.isdisjoint(ids)
    decoded = vocabulary.decode(ids)
    assert decoded in (text, unicodedata.normalize("NFC", text))
