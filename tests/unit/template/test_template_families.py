"""Every family: ids of benign conversations equal to the published renderer's; unfit chat templates refused."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer

from server.errors import ConfigError
from server.template.prompt import PromptBuilder
from server.types import Chat, ModelRequest, Obligations, Principal, SubjectId, TenantId, WireFormat
from tests.vectors.template.families import FAMILIES, REFUSED, Family

if TYPE_CHECKING:
    from server.template.registry import TemplateRegistry

PRINCIPAL = Principal(SubjectId("ann"), TenantId("acme"), frozenset(), frozenset(), "api_key", "k1")
BENIGN = [
    "Write a function that parses a date.",
    "def f(x):\n    if x < 3:\n\n\n        return x  \t\n",
    "  spaces first, several    inside, newline last\n",
    "<table><b>bold</b><code>x</code></table> <sub> and <|unknown|> and [x] and </i>",
    "õ ÷ ÿ é 漢字 🙂 e\u0301 \u00a0 non-breaking",
    "<",
    "word_tokens",
]
TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Reads <a> file & returns it.",
        "parameters": {
            "type": "object",
            "properties": {
                "path": {"type": "string", "description": "Where"},
                "mode": {"type": "string", "enum": ["r", "rb"]},
            },
            "required": ["path"],
        },
    },
}


def stock_ids(family: Family, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    files = family.files()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(files["tokenizer.json"].decode()),
            chat_template=family.template,
            **family.config,
        )
        ids = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=True)[
            "input_ids"
        ]
    return list(ids)


def our_ids(
    builder: PromptBuilder, messages: list[dict[str, Any]], tools: tuple[dict[str, Any], ...] = ()
) -> list[int]:
    request = ModelRequest(WireFormat.CHAT, "m", Chat(tuple(messages), tools), {})
    return builder.render(request, Obligations(templates=("secure-coding",)), PRINCIPAL).token_ids


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda f: f.name)
def family(request: pytest.FixtureRequest) -> Family:
    chosen: Family = request.param
    return chosen


@pytest.fixture(scope="module")
def builder(family: Family, registry: TemplateRegistry) -> PromptBuilder:
    return PromptBuilder(registry, family.files(), accept_shared_turn=family.shared_turn)


def test_benign_ids_equal_stock(family: Family, builder: PromptBuilder, registry: TemplateRegistry):
    block = registry.compose(["secure-coding"]).text
    for text in BENIGN:
        turns = [
            {"role": "user", "content": text},
            {"role": "assistant", "content": f"1 {text}"},
            {"role": "user", "content": "and then?"},
        ]
        assert our_ids(builder, turns) == stock_ids(family, [{"role": "system", "content": block}, *turns]), text


def test_benign_tools_equal_stock(family: Family, builder: PromptBuilder, registry: TemplateRegistry):
    if not family.tools:
        assert builder.chat is not None
        return
    block = registry.compose(["secure-coding"]).text
    arguments = {"path": "a/b.py", "mode": "r", "count": 3, "deep": {"list": [1, "two", None, True]}}
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "read_file", "arguments": arguments}}
    asked: list[dict[str, Any]] = [
        {"role": "user", "content": "Read it."},
        {"role": "assistant", "content": "Yes.", "tool_calls": [call]},
    ]
    result = {"role": "tool", "tool_call_id": "abcdefghi", "content": "def f(): pass\n"}
    sent = json.loads(json.dumps([*asked, result]))
    sent[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(arguments)
    expected = stock_ids(family, [{"role": "system", "content": block}, *asked, result], [TOOL])
    assert our_ids(builder, sent, (TOOL,)) == expected


def test_thinking_of_earlier_answers_is_taken_out_as_the_template_does(registry: TemplateRegistry):
    family = next(f for f in FAMILIES if f.name == "qwen3")
    block = registry.compose(["secure-coding"]).text
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "<think>\nlong thought\n</think>\n\nanswer"},
        {"role": "user", "content": "two"},
    ]
    expected = stock_ids(family, [{"role": "system", "content": block}, *turns])
    assert our_ids(PromptBuilder(registry, family.files()), turns) == expected


@pytest.mark.parametrize(("family", "reason"), REFUSED, ids=lambda v: getattr(v, "name", ""))
def test_unfit_chat_template_is_refused_with_the_reason(registry: TemplateRegistry, family: Family, reason: str):
    with pytest.raises(ConfigError, match=reason):
        PromptBuilder(registry, family.files())


@pytest.mark.parametrize("token", ["õ", "÷", "ÿ"])
def test_text_tokens_keep_their_ids(registry: TemplateRegistry, token: str):
    """Taking the control tokens out of the tokenizer must not renumber what stays in."""
    family = next(f for f in FAMILIES if f.name == "deepseek-v3")
    files = family.files()
    expected: int = Tokenizer.from_str(files["tokenizer.json"].decode()).token_to_id(token)  # type: ignore[assignment]
    assert PromptBuilder(registry, files).vocabulary.encode(f"a{token}b", first=False).count(expected) == 1


def test_tools_are_refused_where_the_template_puts_them_before_the_policy(registry: TemplateRegistry):
    from server.errors import RequestError

    family = next(f for f in FAMILIES if f.name == "qwen2.5-coder")
    template = "{% if tools %}<|im_start|>tools\n{{ tools|tojson }}<|im_end|>\n{% endif %}" + family.template.replace(
        "{%- if tools %}", "{%- if false %}"
    )
    builder = PromptBuilder(registry, family.files(), chat_template=template)
    with pytest.raises(RequestError, match="tools before the security policy"):
        our_ids(builder, [{"role": "user", "content": "x"}], (TOOL,))
    assert our_ids(builder, [{"role": "user", "content": "x"}])
