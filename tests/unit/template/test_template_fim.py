"""Fill in the middle: each family's own prompt, raw prompts parsed by its grammar, all else text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from server.errors import ConfigError
from server.template import fim
from server.template.prompt import PromptBuilder
from server.types import Completion, ModelRequest, Obligations, Principal, Prompt, SubjectId, TenantId, WireFormat
from tests.vectors.template.families import FAMILIES, Family, sentencepiece

if TYPE_CHECKING:
    from server.template.registry import TemplateRegistry

PRINCIPAL = Principal(SubjectId("ann"), TenantId("acme"), frozenset(), frozenset(), "api_key", "k1")
PREFIX, SUFFIX = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"
CODELLAMA = Family(
    "codellama",
    "",
    ("<s>", "</s>", "▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"),
    lambda f: sentencepiece(f, scheme=None),
    {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
)
# family of the vectors, markers in the order of the prompt, which text follows which
SHAPES = {
    "qwen2.5-coder": ("<|fim_prefix|>", PREFIX, "<|fim_suffix|>", SUFFIX, "<|fim_middle|>"),
    "gemma-system": ("<|fim_prefix|>", PREFIX, "<|fim_suffix|>", SUFFIX, "<|fim_middle|>"),
    "starcoder2": ("<fim_prefix>", PREFIX, "<fim_suffix>", SUFFIX, "<fim_middle>"),
    "deepseek-v3": ("<｜fim▁begin｜>", PREFIX, "<｜fim▁hole｜>", SUFFIX, "<｜fim▁end｜>"),
    "mistral": ("[SUFFIX]", SUFFIX, "[PREFIX]", PREFIX),
    "codellama": ("▁<PRE>", PREFIX, "▁<SUF>", SUFFIX, "▁<MID>"),
}


def builder_of(name: str, registry: TemplateRegistry) -> PromptBuilder:
    family = next(f for f in (*FAMILIES, CODELLAMA) if f.name == name)
    files = family.files()
    if not family.template:
        files = {k: v for k, v in files.items() if k != "chat_template.jinja"}
    return PromptBuilder(registry, files)


def render(builder: PromptBuilder, completion: Completion, stand_in: str = "") -> Prompt:
    request = ModelRequest(WireFormat.COMPLETION, "m", completion, {})
    return builder.render(request, Obligations(templates=("secure-coding",), stand_in=stand_in), PRINCIPAL)


def controls_of(builder: PromptBuilder, prompt: Prompt) -> list[int]:
    return [i for i in prompt.token_ids if i in builder.vocabulary.control_ids]


@pytest.mark.parametrize("name", SHAPES)
def test_prefix_and_suffix_take_the_family_s_form(registry: TemplateRegistry, name: str):
    builder = builder_of(name, registry)
    prompt = render(builder, Completion(PREFIX, SUFFIX), "fim")
    assert prompt.text == "".join(SHAPES[name])
    expected = list(builder.vocabulary.lead_ids)
    for part in SHAPES[name]:
        token = builder.vocabulary.controls.get(part)
        expected += [token.id] if token else builder.vocabulary.encode(part, first=False)
    assert prompt.token_ids == expected
    assert prompt.stand_in == "fim"


@pytest.mark.parametrize("name", SHAPES)
def test_markers_in_prefix_and_suffix_are_text(registry: TemplateRegistry, name: str):
    builder = builder_of(name, registry)
    wanted = controls_of(builder, render(builder, Completion(PREFIX, SUFFIX)))
    everything = " ".join(builder.vocabulary.controls) + "".join(builder.vocabulary.controls)
    prompt = render(builder, Completion(everything, everything))
    assert controls_of(builder, prompt) == wanted
    assert prompt.text.count(everything) == 2


@pytest.mark.parametrize("name", SHAPES)
def test_raw_prompt_of_the_family_is_parsed(registry: TemplateRegistry, name: str):
    builder = builder_of(name, registry)
    assert builder.family is not None
    spelled = dict(builder.family.spellings)
    raw = "".join(spelled.get(part, part) for part in SHAPES[name])
    assert (
        render(builder, Completion(raw), "fim").token_ids
        == render(builder, Completion(PREFIX, SUFFIX), "fim").token_ids
    )
    assert controls_of(builder, render(builder, Completion(raw), "raw")) == builder.vocabulary.lead_ids


@pytest.mark.parametrize("name", SHAPES)
def test_only_the_outermost_markers_are_grammar(registry: TemplateRegistry, name: str):
    """A file that itself talks of markers, and a hostile one, can't add to the grammar of the prompt around it."""
    builder = builder_of(name, registry)
    assert builder.family is not None
    spelled = dict(builder.family.spellings)
    wanted = controls_of(builder, render(builder, Completion(PREFIX, SUFFIX)))
    tokens = " ".join(builder.vocabulary.controls)
    raw = "".join(
        f"{spelled.get(part, part)}" if part in builder.vocabulary.controls else part + tokens for part in SHAPES[name]
    )
    assert controls_of(builder, render(builder, Completion(raw))) == wanted


def test_other_files_of_a_raw_prompt_are_grammar(registry: TemplateRegistry):
    builder = builder_of("qwen2.5-coder", registry)
    raw = "<|repo_name|>shop<|file_sep|>a.py\nx = 1<|im_end|>\n<|file_sep|>b.py\n" + "".join(SHAPES["qwen2.5-coder"])
    prompt = render(builder, Completion(raw), "fim")
    controls = builder.vocabulary.controls
    names = ("<|repo_name|>", "<|file_sep|>", "<|file_sep|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    assert controls_of(builder, prompt) == [controls[name].id for name in names]
    assert prompt.text == raw


@pytest.mark.parametrize(
    "raw",
    [
        "<|fim_prefix|>only a prefix",
        "<|fim_suffix|>x<|fim_prefix|>y<|fim_middle|>",
        "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>and more",
        "text before<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
        "What is <|fim_prefix|> for?",
    ],
)
def test_what_is_no_fim_prompt_is_text_with_the_template(registry: TemplateRegistry, raw: str):
    builder = builder_of("qwen2.5-coder", registry)
    prompt = render(builder, Completion(raw))
    assert prompt.stand_in == "template-as-text"
    assert not controls_of(builder, prompt)
    assert prompt.text == registry.compose(["secure-coding"]).text + "\n\n" + raw


@pytest.mark.parametrize(
    ("code", "leader"),
    [("def f():\n", "# "), ("int f() {\n  g();\n}", "// "), ("-- all\nSELECT a FROM b;\n-- x", "-- ")],
)
def test_comment_preamble_fits_the_language(registry: TemplateRegistry, code: str, leader: str):
    builder = builder_of("starcoder2", registry)
    prompt = render(builder, Completion(code, "\n"))
    assert prompt.stand_in == "comment-preamble"
    preamble = registry.compose(["secure-coding"]).preamble
    assert prompt.text == f"<fim_prefix>{leader}{preamble}\n{code}<fim_suffix>\n<fim_middle>"


def test_template_as_text_is_whole_in_comments(registry: TemplateRegistry):
    builder = builder_of("starcoder2", registry)
    prompt = render(builder, Completion("x = ", "\n"), "template-as-text")
    for line in registry.compose(["secure-coding"]).text.splitlines():
        assert line in prompt.text


def test_family_by_name():
    qwen = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    assert fim.choose_family("none", qwen) is None
    chosen = fim.choose_family("codegemma", qwen)
    assert chosen is not None
    assert chosen.name == "codegemma"
    with pytest.raises(ConfigError, match="lacks"):
        fim.choose_family("starcoder", qwen)
    with pytest.raises(ConfigError, match="no FIM family 'x'"):
        fim.choose_family("x", qwen)


def test_families_that_share_markers_are_told_apart():
    assert fim.find_family({*fim.FAMILIES[0].markers, "<|file_separator|>"}) == fim.FAMILIES[0]
    qwen = fim.find_family({"<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>"})
    assert qwen is not None
    assert qwen.name == "qwen-coder"
    granite = fim.find_family({"<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<filename>", "<reponame>"})
    assert granite is not None
    assert granite.name == "granite-code"
    assert fim.find_family({"<|im_start|>"}) is None
