"""SARIF output is SARIF by the standard's own schema, whatever files are called and whatever is found."""

from __future__ import annotations

import copy
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.cli import main
from server.guard.sarif import to_sarif
from server.types import Finding, ScanReport, ScanState
from tests.vectors.sarif.check import check_sarif

if TYPE_CHECKING:
    from pathlib import Path

BAD = b"import os\nos.system('ping ' + input())\n"
NAMES = [b"a b.py", b"100%.py", b"c:d#e?.py", b"\xc3\xa4.py", b"\xff\xfe.py", b"[x]{y}|.py", b"sub/../q.py"]

# Letters of every kind, without halves of surrogate pairs: bodies that hold those are refused.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
findings = st.builds(
    Finding,
    rule=texts.filter(bool),
    category=st.sampled_from(["secret", "characters", "insecure", "package", "licence"]),
    severity=st.sampled_from(["low", "medium", "high", "critical"]),
    message=texts,
    start=st.integers(0, 9),
    end=st.integers(0, 9),
    line=st.none() | st.integers(1, 9),
    cwe=st.none() | st.just("CWE-78"),
    fix=st.none() | texts,
)
reports = st.builds(
    ScanReport, st.sampled_from(list(ScanState)), st.lists(findings, max_size=4).map(tuple), st.none() | texts
)


@given(st.lists(st.tuples(texts, reports), max_size=4))
def test_any_reports_make_valid_sarif(named: list[tuple[str, ScanReport]]) -> None:
    log = to_sarif(named)
    check_sarif(json.loads(json.dumps(log)))
    check_sarif(json.loads(json.dumps(to_sarif([*named, *named]))))  # two texts may have one name


def test_the_command_names_odd_files_as_the_standard_wants(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sub").mkdir()
    for name in NAMES:
        (tmp_path / os.fsdecode(name)).write_bytes(BAD)
    (tmp_path / "blob.bin").write_bytes(b"\0\xff" * 100)
    assert main(["scan", str(tmp_path), "--format", "sarif"]) == 1
    log = json.loads(capsys.readouterr().out)
    check_sarif(log)
    found = {r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in log["runs"][0]["results"]}
    assert {uri.rpartition("/")[2] for uri in found} == {
        "a%20b.py", "100%25.py", "c%3Ad%23e%3F.py", "%C3%A4.py", "%FF%FE.py", "%5Bx%5D%7By%7D%7C.py", "q.py",
    }  # fmt: skip


def break_version(log: dict[str, Any]) -> None:
    log["version"] = "2.0.0"


def break_tool(log: dict[str, Any]) -> None:
    del log["runs"][0]["tool"]


def break_line(log: dict[str, Any]) -> None:
    log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["region"]["startLine"] = 0


def break_uri(log: dict[str, Any]) -> None:
    log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] = "a b.py"


def break_field(log: dict[str, Any]) -> None:
    log["runs"][0]["results"][0]["cwe"] = "CWE-78"


def break_index(log: dict[str, Any]) -> None:
    log["runs"][0]["results"][0]["ruleId"] = "another"


@pytest.mark.parametrize(
    "break_it", [break_version, break_tool, break_line, break_uri, break_field, break_index], ids=lambda f: f.__name__
)
def test_the_check_refuses_what_is_not_sarif(break_it: Any) -> None:
    finding = Finding("r", "insecure", "high", "m", 0, 1, line=1)
    log = to_sarif([("a.py", ScanReport(ScanState.FINDINGS, (finding,)))])
    check_sarif(log)
    broken = copy.deepcopy(log)
    break_it(broken)
    with pytest.raises(AssertionError):
        check_sarif(broken)
