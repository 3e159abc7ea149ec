"""Where marks go, how rendered text is split, what the cache holds."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import ConfigError
from server.template.vocabulary import SegmentCache, Vocabulary, _trie_source
from tests.vectors.template.families import FAMILIES

MARK = "\uf8d0"


def vocabulary(name: str = "qwen2.5-coder") -> Vocabulary:
    family = next(f for f in FAMILIES if f.name == name)
    return Vocabulary(family.files()["tokenizer.json"], family.config, template_text=family.template)


@pytest.mark.parametrize(
    ("text", "guarded"),
    [
        ("plain a < b |> c", "plain a < b |> c"),
        ("", ""),
        ("x<|im_end|>y", f"x<{MARK}|im_end|>y"),
        ("<|im_end|><|im_end|>", f"<{MARK}|im_end|><{MARK}|im_end|>"),
        ("<tool_call>", f"<{MARK}tool_call>"),
        ("ends with <|im_", f"ends with <|im_{MARK}"),
        ("ends with <  \n", f"ends with <{MARK}  \n"),
        ("  end|> begins", f"  {MARK}end|> begins"),
        ("<|im_<|im_end|>end|>", f"<|im_<{MARK}|im_end|>end|>"),
    ],
)
def test_marks_break_spellings_and_stand_at_edges_that_could_complete_one(text: str, guarded: str):
    assert vocabulary().guard(text, MARK) == guarded


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    words=st.lists(st.text("ab<|", min_size=1, max_size=5), min_size=1, max_size=12), text=st.text("ab<|", max_size=40)
)
def test_shared_beginnings_find_what_a_plain_alternation_finds(words: list[str], text: str):
    plain = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))
    assert re.findall(_trie_source(words), text) == plain.findall(text)


def test_thousands_of_tokens_are_not_tried_one_by_one():
    """Gemma has 6,242 of these: each `<` of a text would cost as many comparisons."""
    source = _trie_source([f"<unused{n}>" for n in range(6242)])
    assert source.startswith("<unused(?:0>|1(?:")


def test_overlapping_tokens_are_all_broken():
    family = next(f for f in FAMILIES if f.name == "qwen2.5-coder")
    data = json.loads(family.files()["tokenizer.json"])
    last = max(t["id"] for t in data["added_tokens"])
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    data["added_tokens"] += [{"id": last + 1, "content": "<ab>", **flags}, {"id": last + 2, "content": "b>c<", **flags}]
    made = Vocabulary(json.dumps(data).encode(), family.config)
    assert not [piece for piece in made.split(made.guard("<ab>c<ab>c<", MARK)) if isinstance(piece, int)]


def test_flags_take_white_space_as_the_tokenizer_does():
    made = vocabulary("flags")
    mask, end = made.controls["<mask>"].id, made.controls["<|im_end|>"].id
    assert made.split("a \n <mask> \t b<|im_end|> c") == ["a", mask, "b", end, " c"]
    word = made.controls["word_token"].id
    assert made.split("word_token words word_tokens") == [word, " words word_tokens"]


def test_cache_is_bounded_and_forgets_the_oldest():
    cache = SegmentCache(1000)
    for number in range(20):
        cache.put(("t", False, f"{number:03}" * 20), [number])
    assert cache.get(("t", False, "000" * 20)) is None
    assert cache.get(("t", False, "019" * 20)) == [19]
    cache.put(("t", False, "x" * 300), [1])
    assert cache.get(("t", False, "x" * 300)) is None


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"added_tokens": [{"id": 1}]}', b'{"model": {}}', b"{}"])
def test_broken_tokenizer_is_refused(content: bytes):
    with pytest.raises(ConfigError, match=r"tokenizer\.json can't be"):
        Vocabulary(content, {})


def test_one_character_control_token_is_refused():
    family = next(f for f in FAMILIES if f.name == "qwen2.5-coder")
    data = json.loads(family.files()["tokenizer.json"])
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 9000, "content": "~", "special": True})
    with pytest.raises(ConfigError, match="one character"):
        Vocabulary(json.dumps(data).encode(), family.config)
