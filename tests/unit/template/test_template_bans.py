"""What policy bans by its spelling becomes tokens of the model, or the request is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from server.errors import ConfigError
from server.template.prompt import MAX_BANNED_IDS, PromptBuilder
from server.types import Chat, Completion, Embedding, ModelRequest, Obligations, Payload, Prompt, WireFormat
from tests.unit.template.test_template_render import PRINCIPAL

if TYPE_CHECKING:
    from pathlib import Path

    from server.template.registry import TemplateRegistry

CHAT = Chat(messages=({"role": "user", "content": "x"},))


def render(builder: PromptBuilder, *words: str, payload: Payload = CHAT) -> Prompt:
    demands = Obligations(templates=("secure-coding",), stand_in="raw", ban_tokens=words)
    return builder.render(ModelRequest(WireFormat.CHAT, "m", payload, {}), demands, PRINCIPAL)


def spelled(builder: PromptBuilder, prompt: Prompt) -> list[str]:
    return sorted(builder.vocabulary.decode([token]) for token in prompt.banned_ids)


def test_a_word_stands_for_its_tokens_with_and_without_a_space(smollm2: PromptBuilder) -> None:
    assert spelled(smollm2, render(smollm2, "return", "import")) == [" import", " return", "import", "return"]
    raw = render(smollm2, "return", payload=Completion("def f():"))
    assert spelled(smollm2, raw) == [" return", "return"]


def test_a_control_token_is_banned_by_its_name(smollm2: PromptBuilder) -> None:
    assert render(smollm2, "<repo_name>").banned_ids == (smollm2.vocabulary.controls["<repo_name>"].id,)


def test_nothing_is_banned_where_nothing_is_said(smollm2: PromptBuilder) -> None:
    assert render(smollm2).banned_ids == ()
    assert render(smollm2, "return", payload=Embedding(("x",))).banned_ids == ()


@pytest.mark.parametrize("word", ["hyperparathyroidism", "<|no_such_token|>", "return x"])
def test_what_is_no_token_of_the_model_refuses_the_request(smollm2: PromptBuilder, word: str) -> None:
    with pytest.raises(ConfigError, match="no token that is spelled so"):
        render(smollm2, "return", word)


def test_the_end_of_an_answer_can_not_be_banned(
    smollm2: PromptBuilder, smollm2_dir: Path, registry: TemplateRegistry
) -> None:
    with pytest.raises(ConfigError, match="no answer of this model ends"):
        render(smollm2, "<|im_end|>")  # the tokenizer's own
    (token,) = smollm2.vocabulary.ids_of_word("<|endoftext|>")
    other = PromptBuilder.load(registry, smollm2_dir, end_ids=frozenset({token}))
    with pytest.raises(ConfigError, match="no answer of this model ends"):
        render(other, "<|endoftext|>")  # one that the model's configuration names


def test_an_engine_that_takes_messages_can_ban_nothing(smollm2_dir: Path, registry: TemplateRegistry) -> None:
    builder = PromptBuilder.load(registry, smollm2_dir, messages=True)
    assert not render(builder).banned_ids
    with pytest.raises(ConfigError, match="takes messages only"):
        render(builder, "return")


def test_bans_are_bounded(smollm2: PromptBuilder) -> None:
    words = [
        text
        for token in range(300, 3000)
        if (text := smollm2.vocabulary.decode([token]).strip()).isalpha() and smollm2.vocabulary.ids_of_word(text)
    ]
    assert len(words) > MAX_BANNED_IDS
    with pytest.raises(ConfigError, match=f"at most {MAX_BANNED_IDS} are possible"):
        render(smollm2, *sorted(set(words)))


def test_a_token_for_unknown_text_is_none_of_its_words(smollm2: PromptBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2.vocabulary, "decode", lambda _: "<unk>")
    assert smollm2.vocabulary.ids_of_word("return") == frozenset()
