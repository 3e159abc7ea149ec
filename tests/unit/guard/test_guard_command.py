"""`strongroom scan` and `strongroom index` from the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from server.cli import main
from server.guard import licence

KEY = "ghp_" + "Zx8Kq2mN4vB7cR1tY6wE9uI3oP5aS0dFgHjL"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "bad.py").write_text("import os\nos.system('ping ' + input())\n")
    (tmp_path / "good.py").write_text("print('hello')\n")
    (tmp_path / "notes.md").write_text(f"The token is {KEY}\n")
    (tmp_path / "blob.bin").write_bytes(b"\0\xff" * 100)
    return tmp_path


def test_json_names_file_line_and_rule_and_no_text(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", str(tree), "--format", "json"]) == 1
    out = capsys.readouterr().out
    assert KEY not in out
    files = {Path(f["path"]).name: f for f in json.loads(out)["files"]}
    assert files["good.py"]["state"] == "clean"
    assert files["blob.bin"]["state"] == "unscanned"
    assert files["notes.md"]["findings"][0]["rule"] == "github-token"
    assert (files["bad.py"]["findings"][0]["cwe"], files["bad.py"]["findings"][0]["line"]) == ("CWE-78", 2)


def test_sarif_has_rules_results_and_notifications(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", str(tree), "--format", "sarif"]) == 1
    log = json.loads(capsys.readouterr().out)
    run = log["runs"][0]
    assert log["version"] == "2.1.0"
    ids = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert {ids[result["ruleIndex"]] for result in run["results"]} == {result["ruleId"] for result in run["results"]}
    assert run["invocations"][0]["executionSuccessful"] is False
    assert len(run["invocations"][0]["toolExecutionNotifications"]) == 1


def test_clean_is_zero_and_severity_filters(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", str(tree / "good.py")]) == 0
    assert main(["scan", str(tree / "bad.py"), "--severity", "critical"]) == 0
    assert "unscanned" in capsys.readouterr().err


def test_standard_input_and_jsonl(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO((tree / "bad.py").read_text()))
    assert main(["scan", "-", "--stdin-path", "x.py", "--json"]) == 1
    lines = tree / "in.jsonl"
    lines.write_text(
        json.dumps({"text": "fine"}) + "\n" + json.dumps({"text": f"k {KEY}"}) + "\n" + json.dumps({}) + "\n"
    )
    capsys.readouterr()
    assert main(["scan", str(lines), "--jsonl", "text", "--json"]) == 1
    assert [f["state"] for f in json.loads(capsys.readouterr().out)["files"]] == ["clean", "findings", "unscanned"]


def test_what_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scan", "/nowhere/at/all"]) == 1
    assert main(["scan", ".", "--language", "klingon"]) == 1
    assert "klingon" in capsys.readouterr().err


def test_index_adds_up(tree: Path, tmp_path: Path) -> None:
    code = tmp_path / "lib"
    code.mkdir()
    (code / "a.py").write_text("\n".join(f"def f{i}(a):\n    return a + {i} * a - {i}\n" for i in range(30)))
    out = tmp_path / "protected.json"
    assert main(["index", str(code), "--licence", "MIT", "--out", str(out)]) == 0
    assert main(["index", str(code), "--licence", "MIT", "--out", str(out)]) == 0
    assert len(licence.load(out).files) == 2
