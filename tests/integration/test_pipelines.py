"""`strongroom review` and `strongroom batch` as users run them, against a whole gateway."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from benchmarks.gateway.kit import MODEL, ROOT
from tests.vectors.sarif.check import check_sarif

DIFF = """diff --git a/app.py b/app.py
--- a/app.py
+++ b/app.py
@@ -1,2 +1,3 @@
 def find(db, name):
-    return db.execute("SELECT 1")
+    sql = "SELECT * FROM users WHERE name = '" + name + "'"
+    return db.execute(sql)
"""
FINDING = {"line": 2, "severity": "high", "cwe": "CWE-89", "message": "SQL from a name", "fix": "Bind the name."}


@pytest.fixture(scope="module")
def env(gateway):
    def of(group: str) -> dict[str, str]:
        key = gateway.new_key(groups={group}, subject=group)
        gateway.wait_for_key(key)
        variables = {"OPENAI_BASE_URL": gateway.base + "/v1", "OPENAI_API_KEY": key, "MODEL": MODEL}
        return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", **variables}

    return {group: of(group) for group in ("reviewers", "extractors", "developers")}


@pytest.fixture(autouse=True)
def told(gateway):
    yield gateway.control
    gateway.control()


def accepted(gateway) -> list[dict[str, Any]]:
    return [entry for entry in gateway.entries() if entry["event"] == "gateway:request:accepted"]


def strongroom(*arguments: str, env: dict[str, str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "server.cli", *arguments]
    return subprocess.run(argv, env=env, input=text, capture_output=True, text=True, timeout=120, check=False)


def test_a_review_stands_under_its_template_and_prints_sarif(env, told):
    told(text=json.dumps({"findings": [FINDING]}), num_tokens=20)
    done = strongroom("review", "--diff", "-", "--format", "sarif", env=env["reviewers"], text=DIFF)
    assert done.returncode == 1, done.stderr
    log = json.loads(done.stdout)
    check_sarif(log)
    (result,) = log["runs"][0]["results"]
    assert result["ruleId"] == "review-cwe-89"
    place = result["locations"][0]["physicalLocation"]
    assert (place["artifactLocation"]["uri"], place["region"]["startLine"]) == ("app.py", 2)
    assert "secure-coding+review@" in done.stderr
    told(text='{"findings": []}', num_tokens=5)
    assert strongroom("review", "--diff", "-", env=env["reviewers"], text=DIFF).returncode == 0
    other = strongroom("review", "--diff", "-", env=env["developers"], text=DIFF)
    assert "use a key of a group that gets it" in other.stderr


def test_an_answer_that_is_no_review_is_not_clean(env, told, gateway):
    told(text="Looks good to me!", num_tokens=5)
    num_accepted = len(accepted(gateway))
    done = strongroom("review", "--diff", "-", "--json", env=env["reviewers"], text=DIFF)
    assert done.returncode == 1
    assert json.loads(done.stdout)["files"][0]["state"] == "unscanned"
    assert len(accepted(gateway)) == num_accepted + 2  # asked for once more


def test_a_server_that_does_not_answer_is_told(env):
    gone = env["reviewers"] | {"OPENAI_API_KEY": "sr_wrong"}
    done = strongroom("review", "--diff", "-", "--json", env=gone, text=DIFF)
    assert done.returncode == 1
    assert "invalid_api_key" in json.loads(done.stdout)["files"][0]["reason"]


def requests(num: int) -> str:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
    lines = [{"custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(num)]
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_a_batch_that_is_killed_goes_on_and_answers_every_line_once(env, told, tmp_path):
    told(num_tokens=4, first_delay_ms=40)
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(requests(60))
    argv = [sys.executable, "-m", "server.cli", "batch", str(source), str(out), "--concurrency", "3"]
    for _ in range(3):
        process = subprocess.Popen(argv, env=env["developers"], stderr=subprocess.DEVNULL)
        size = out.stat().st_size if out.exists() else 0
        end_s = time.monotonic() + 60
        while (not out.exists() or out.stat().st_size < size + 3_000) and time.monotonic() < end_s:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with out.open("a") as file:
            file.write('{"custom_id": "r5')  # as a kill in the middle of a write leaves it
    assert len(out.read_text().splitlines()) < 60
    done = strongroom("batch", str(source), str(out), "--json", env=env["developers"])
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["kept"] > 0
    assert counts["kept"] + counts["done"] == 60
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(line["custom_id"] for line in lines) == sorted(f"r{n}" for n in range(60))
    assert all(line["response"]["status_code"] == 200 and line["response"]["request_id"] for line in lines)


def test_what_the_server_refuses_is_an_answer_and_what_failed_is_asked_again(env, told, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"model": "none", "messages": [{"role": "user", "content": "hi"}]}
    wrong = {"custom_id": "w", "url": "/v1/chat/completions", "body": body}
    source.write_text(requests(2) + json.dumps(wrong) + "\n")
    down = env["developers"] | {"OPENAI_API_KEY": "sr_wrong"}
    assert strongroom("batch", str(source), str(out), env=down).returncode == 1
    assert all(json.loads(line)["response"]["status_code"] == 401 for line in out.read_text().splitlines())
    strongroom("batch", str(source), str(out), env=env["developers"])
    codes = {
        json.loads(line)["custom_id"]: json.loads(line)["response"]["status_code"]
        for line in out.read_text().splitlines()
    }
    assert codes == {"r0": 200, "r1": 200, "w": 404}
    assert len(out.read_text().splitlines()) == 3


def test_fields_are_extracted_and_what_does_not_fit_is_kept_apart(env, told, tmp_path):
    schema, source, out = tmp_path / "s.json", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    schema.write_text(json.dumps({"type": "object", "properties": {"host": {"type": "string"}}, "required": ["host"]}))
    source.write_text('{"custom_id": "a", "text": "the host is alpha"}\n{"text": "the host is beta"}\n')
    run = ("batch", str(source), str(out), "--schema", str(schema), "--json")
    told(text='{"host": "alpha"}', num_tokens=5)
    done = strongroom(*run, env=env["extractors"])
    assert done.returncode == 0, done.stderr
    records = sorted(
        (json.loads(line) for line in out.read_text().splitlines()), key=lambda record: record["custom_id"]
    )
    assert records == [{"custom_id": "2", "fields": {"host": "alpha"}}, {"custom_id": "a", "fields": {"host": "alpha"}}]
    out.unlink()
    told(text='{"port": 1}', num_tokens=5)
    done = strongroom(*run, env=env["extractors"])
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"done": 0, "kept": 0, "invalid": 2, "failed": 0}
    apart = [json.loads(line) for line in (tmp_path / "out.invalid.jsonl").read_text().splitlines()]
    assert {line["custom_id"] for line in apart} == {"a", "2"}
    assert all("'host' is a required property" in line["reason"] for line in apart)
    assert json.loads(strongroom(*run, env=env["extractors"]).stdout)["invalid"] == 2  # final: not asked again
