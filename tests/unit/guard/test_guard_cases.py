"""The labelled cases: rates stay above the floor, and the page says what they are."""

from __future__ import annotations

import pytest

from benchmarks.guard import rates
from server.guard import languages, scan
from server.guard.rules import load_language
from server.types import ScanState

PAIRS = rates.load_pairs()


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p.language}-{p.name.replace(' ', '-')}")
def test_twins_are_told_apart(pair: rates.Pair) -> None:
    insecure = scan.scan_text(pair.insecure, language=pair.label)
    assert insecure.state is ScanState.FINDINGS
    assert all(f.cwe and f.message and f.start < f.end for f in insecure.findings)
    assert scan.scan_text(pair.safe, language=pair.label).state is ScanState.CLEAN


@pytest.mark.parametrize("pair", PAIRS[::3], ids=lambda p: f"{p.language}-{p.name.replace(' ', '-')}")
def test_a_fence_a_file_and_a_guess_agree(pair: rates.Pair) -> None:
    alone = {(f.rule, f.end - f.start) for f in scan.scan_text(pair.insecure, language=pair.label).findings}
    fenced = f"Here:\n\n  ```{pair.label}\n" + "".join(f"  {x}\n" for x in pair.insecure.splitlines()) + "  ```\n"
    assert {f.rule for f in scan.scan_text(fenced).findings} >= {rule for rule, _ in alone}


@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: f"{p.language}-{p.name.replace(' ', '-')}")
def test_code_in_comments_is_not_a_finding(pair: rates.Pair) -> None:
    mark = {"python": "#", "shell": "#", "terraform": "#", "dockerfile": "#", "sql": "--"}.get(pair.language, "//")
    lines = [line for line in pair.insecure.splitlines() if not scan.find_anywhere(line)]  # one in a comment is one too
    text = "".join(f"{mark} {line}\n" for line in lines)
    assert scan.scan_text(text, language=pair.label).state is ScanState.CLEAN


@pytest.mark.parametrize(("text", "is_secret"), rates.load_secrets())
def test_secrets_and_look_alikes(text: str, is_secret: bool) -> None:
    found = scan.find_anywhere(text)
    assert bool(found) == is_secret
    assert all(f.category == "secret" and f.cwe == "CWE-798" for f in found)


@pytest.mark.parametrize(
    "folder", ["held-out", "held-out/second", "held-out/third", "held-out/fourth", "held-out/fifth", "held-out/sixth"]
)
def test_held_out_cases_stay_above_the_aim(folder: str) -> None:
    for name, pairs, caught, wrong, apart in rates.rates(rates.CASES / folder):
        assert caught >= 0.6 * pairs, name
        assert wrong <= 0.08 * pairs, name
        assert apart >= 0.5 * pairs, name
    secrets = rates.load_secrets(rates.CASES / folder)
    hits = [(bool(scan.find_anywhere(text)), is_secret) for text, is_secret in secrets]
    assert sum(hit for hit, is_secret in hits if is_secret) >= 0.95 * sum(is_secret for _, is_secret in hits)
    assert sum(hit for hit, is_secret in hits if not is_secret) <= 0.02 * sum(not is_secret for _, is_secret in hits)


def test_every_language_has_rules_with_unique_ids() -> None:
    for name in languages.LANGUAGES:
        rules = load_language(name)
        assert rules is not None, name
        ids = [p.rule.id for p in rules.patterns]
        assert len(ids) == len(set(ids)), name
        assert all(p.rule.message for p in rules.patterns)
        assert all(s.rule.message for s in rules.sinks)


def test_languages_are_guessed_from_what_the_code_says() -> None:
    wrong = [
        p for p in PAIRS if languages.guess(p.insecure) not in {p.language, "tsx", "cpp", "javascript", "typescript"}
    ]
    assert len(wrong) <= len(PAIRS) // 8, [(p.language, p.name, languages.guess(p.insecure)) for p in wrong]


def test_the_page_has_the_rates() -> None:
    page = rates.PAGE.read_text()
    assert rates.table() in page, "run: python -m benchmarks.guard.rates --write"
