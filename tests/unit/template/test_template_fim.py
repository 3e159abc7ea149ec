"""Fill in the middle: each family's own prompt, raw prompts parsed by its grammar, all else text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def builder_of(name: str, registry: TemplateRegistry, **options: Any) -> PromptBuilder:
    family = next(f for f in (*FAMILIES, CODELLAMA) if f.name == name)
    files = family.files()
    if not family.template:
        files = {k: v for k, v in files.items() if k != "chat_template.jinja"}
    return PromptBuilder(registry, files, **options)


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


LINES = [f"value_{n} = compute({n})  # line {n}\n" for n in range(2000)]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("raw", [False, True])
def test_context_is_trimmed_around_the_cursor(registry: TemplateRegistry, name: str, raw: bool):
    builder = builder_of(name, registry, max_model_len=512)
    assert builder.family is not None
    before, after = "".join(LINES[:1000]), "".join(LINES[1000:])
    spelled = dict(builder.family.spellings)
    if raw:
        texts = {PREFIX: before, SUFFIX: after}
        completion = Completion("".join(texts.get(part, spelled.get(part, part)) for part in SHAPES[name]))
    else:
        completion = Completion(before, after)
    prompt = render(builder, completion, "fim")
    assert 512 * 3 // 4 - 60 < prompt.num_tokens <= 512 - 128
    assert controls_of(builder, prompt) == controls_of(builder, render(builder, Completion(PREFIX, SUFFIX), "fim"))
    text = prompt.text
    assert LINES[999] in text
    assert LINES[1000] in text
    assert LINES[0] not in text
    assert LINES[1999] not in text
    kept = [sum(line in text for line in side) for side in (LINES[:1000], LINES[1000:])]
    assert kept[0] > 2 * kept[1] > 0


def test_trimming_gives_each_side_what_the_other_leaves():
    parts = fim.FimPrompt("b" * 1000, "a" * 10, (("<|file_sep|>", "other"),))
    assert fim.trim(parts, 100) == fim.FimPrompt("b" * 90, "a" * 10)
    assert fim.trim(fim.FimPrompt("b" * 10, "a" * 1000), 100) == fim.FimPrompt("b" * 10, "a" * 90)
    assert fim.trim(fim.FimPrompt("b" * 1000, "a" * 1000), 100) == fim.FimPrompt("b" * 75, "a" * 25)
    assert fim.trim(fim.FimPrompt("b" * 10, "a" * 10), 0) == fim.FimPrompt("", "")


def test_other_files_go_before_anything_near_the_cursor(registry: TemplateRegistry):
    builder = builder_of("qwen2.5-coder", registry, max_model_len=256)
    raw = "<|file_sep|>a.py\n" + "x = 1\n" * 500 + "".join(SHAPES["qwen2.5-coder"])
    prompt = render(builder, Completion(raw), "fim")
    assert prompt.text == "".join(SHAPES["qwen2.5-coder"])


def test_a_chat_model_s_instruction_is_trimmed_too(registry: TemplateRegistry):
    builder = builder_of("qwen2.5-coder", registry, max_model_len=4096, fim_family="none")
    assert builder.family is None
    prompt = render(builder, Completion("".join(LINES[:1000]), "".join(LINES[1000:])))
    assert prompt.num_tokens <= 4096 - 256
    assert LINES[999] in prompt.text
    assert LINES[1000] in prompt.text


# As each family publishes it: prefix P, suffix S, then the model speaks.
PUBLISHED = {
    "codegemma": "<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>",
    "qwen-coder": "<|fim_prefix|>P<|fim_suffix|>S<|fim_middle|>",
    "starcoder": "<fim_prefix>P<fim_suffix>S<fim_middle>",
    "granite-code": "<fim_prefix>P<fim_suffix>S<fim_middle>",
    "deepseek-coder": "<｜fim▁begin｜>P<｜fim▁hole｜>S<｜fim▁end｜>",
    "codellama": "▁<PRE>P▁<SUF>S▁<MID>",
    "codestral": "[SUFFIX]S[PREFIX]P",
}
# A model of the vectors whose vocabulary has the family's markers.
MODELS = {
    "codegemma": "gemma-system", "qwen-coder": "qwen2.5-coder", "starcoder": "starcoder2",
    "granite-code": "starcoder2", "deepseek-coder": "deepseek-v3", "codellama": "codellama", "codestral": "mistral",
}  # fmt: skip


def test_every_family_of_the_registry_is_held_to_its_published_format():
    assert set(PUBLISHED) == {family.name for family in fim.FAMILIES} == set(MODELS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_family_by_name_gives_its_published_format(registry: TemplateRegistry, name: str):
    builder = builder_of(MODELS[name], registry, fim_family=name)
    assert render(builder, Completion("P", "S"), "fim").text == PUBLISHED[name]
