"""A diff is cut without losing or misplacing a line; an answer is a review or it is not."""

from __future__ import annotations

import difflib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ConfigError
from server.pipelines import review
from server.types import ScanState

LINES = st.lists(st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=30), max_size=40)


def diff_of(old: list[str], new: list[str], path: str = "a.py") -> str:
    return "\n".join(difflib.unified_diff(old, new, f"a/{path}", f"b/{path}", lineterm=""))


@given(LINES, LINES, st.integers(60, 400))
def test_every_new_line_is_shown_once_under_its_number(old: list[str], new: list[str], max_chars: int):
    chunks = review.parse_diff(diff_of(old, new), max_chars=max_chars)
    shown = [line for chunk in chunks for line in chunk.text.split("\n")]
    added = {int(line[:5]): line[7:] for line in shown if line[5:6] == "+" and line[:5].strip().isdigit()}
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=True)
    changed = {
        number + 1
        for tag, _, _, start, end in matcher.get_opcodes()
        if tag in ("insert", "replace")
        for number in range(start, end)
    }
    assert changed == set(added)
    assert all(new[number - 1] == text for number, text in added.items())
    assert all(chunk.path == "a.py" for chunk in chunks)
    assert set(added) <= {number for chunk in chunks for number in chunk.lines}


def test_files_are_apart_and_removed_ones_are_left_out():
    gone = "--- a/x.py\n+++ /dev/null\n@@ -1 +0,0 @@\n-import os\n"
    chunks = review.parse_diff(gone + diff_of(["a"], ["b"], "src/y.py") + "\n" + diff_of([], ["c"], "z.py"))
    assert [(chunk.path, chunk.lines) for chunk in chunks] == [
        ("src/y.py", frozenset({1})),
        ("z.py", frozenset({1})),
    ]


def test_lines_that_look_like_heads_stay_in_their_hunk():
    chunks = review.parse_diff(diff_of(["-- a", "x"], ["++ b/evil.py", "@@ -1 +1 @@"], "q.sql"))
    assert [chunk.path for chunk in chunks] == ["q.sql"]
    assert "++ b/evil.py" in chunks[0].text


@pytest.mark.parametrize("diff", ["hello\n", "--- a\n+++ b\n@@ -1,2 +1,2 @@\n x\n", "+++ b/a\n@@ -1 +1 @@\n?x\n"])
def test_what_is_no_whole_diff_is_refused(diff: str):
    with pytest.raises(ConfigError, match="git diff"):
        review.parse_diff(diff)


def test_a_change_of_names_only_has_nothing_to_review():
    assert review.parse_diff("diff --git a/x b/y\nsimilarity index 100%\nrename from x\nrename to y\n") == []


CHUNK = review.parse_diff(diff_of(["a", "b", "c"], ["a", "q = 'SELECT ' + x", "c"]))[0]
ITEM = {"line": 2, "severity": "high", "cwe": "CWE-89", "message": "SQL  from\ntext", "fix": "Bind it."}


def answer(content: object, finish: str = "stop") -> dict[str, Any]:
    text = content if isinstance(content, str) else json.dumps(content)
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}]}


def test_a_review_becomes_findings():
    report = review.parse_answer(CHUNK, answer({"findings": [ITEM, {**ITEM, "line": 99, "cwe": "none"}]}))
    assert report.state is ScanState.FINDINGS
    first, second = report.findings
    assert (first.rule, first.cwe, first.line, first.message) == ("review-cwe-89", "CWE-89", 2, "SQL from text")
    assert (second.rule, second.cwe, second.line) == ("review", None, 3)  # moved to the nearest line of the change
    assert review.parse_answer(CHUNK, answer({"findings": []})).state is ScanState.CLEAN


@pytest.mark.parametrize(
    "body",
    [
        answer("I looked at it and it is fine."),
        answer({"findings": [ITEM]}, finish="length"),
        answer({"findings": [{**ITEM, "severity": "fatal"}]}),
        answer({"findings": [{**ITEM, "line": "2"}]}),
        answer({"findings": [{"line": 2}]}),
        answer({"findings": {}}),
        answer("[]"),
        answer("[" * 100_000),
        {"choices": []},
        {},
        None,
    ],
)
def test_what_is_no_review_is_never_clean(body: object):
    report = review.parse_answer(CHUNK, body)
    assert report.state is ScanState.UNSCANNED
    assert report.reason


def test_one_part_without_a_review_leaves_its_file_unscanned():
    good = review.parse_answer(CHUNK, answer({"findings": [ITEM]}))
    bad = review.parse_answer(CHUNK, None)
    merged = review.merge([(CHUNK, good), (CHUNK, bad)])
    assert merged["a.py"].state is ScanState.UNSCANNED
    assert len(merged["a.py"].findings) == 1
