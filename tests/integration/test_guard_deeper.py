"""The second look at the code of an answer: by a stand-in that misbehaves, and (slow) by the real engine."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from benchmarks.gateway.kit import MODEL, wait_until
from server.guard import deeper
from server.guard.deeper import DeeperScanner

if TYPE_CHECKING:
    from collections.abc import Iterator

PYTHON = "import os\n\n\ndef run():\n    name = input()\n    command = 'ping ' + name\n    os.system(command)\n"
SAFE = "import os\nimport shlex\n\n\ndef run():\n    name = input()\n    os.system('ping ' + shlex.quote(name))\n"

VERDICT = """
import json, os, sys
found = []
for name in sorted(os.listdir("code")):
    if "input()" in open("code/" + name).read():
        found.append({"check_id": "a.b.own-rule", "path": "code/" + name, "start": {"line": 7},
                      "extra": {"severity": "ERROR", "metadata": {"cwe": "CWE-78"}}})
said = {"results": found, "errors": [], "paths": {"scanned": ["code/" + n for n in os.listdir("code")]}}
"""


def stand_in(folder: Path, body: str) -> Path:
    """An executable that is started as semgrep is."""
    path = folder / "engine"
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(body)}")
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place of our own in memory; no code is left in it."""
    folder = Path(tempfile.mkdtemp(dir=deeper._SHARED_MEMORY))
    monkeypatch.setattr(deeper, "_SHARED_MEMORY", folder)
    yield folder
    left = list(folder.iterdir())
    shutil.rmtree(folder)
    assert not left


async def scan(path: Path, *blocks: tuple[str, str | None], timeout_s: float = 20, **changes: Any) -> dict[str, Any]:
    return await DeeperScanner(path, timeout_s=timeout_s, **changes).scan(blocks or ((PYTHON, "python"),))


async def test_findings_and_clean_and_what_has_no_rules(tmp_path: Path) -> None:
    engine = stand_in(tmp_path, VERDICT + "print(json.dumps(said))")
    told = await scan(engine, ("x = 1\n", "python"), (PYTHON, None))
    assert told["state"] == "findings"
    assert told["findings"] == [{"block": 1, "rule": "own-rule", "severity": "high", "cwe": "CWE-78", "line": 7}]
    assert (await scan(engine, ("x = 1\n", "python")))["state"] == "clean"
    mixed = await scan(engine, (PYTHON, "python"), ("package main\n", "go"))
    assert (mixed["state"], mixed["num_findings"]) == ("unscanned", 1)
    assert "go" in mixed["reason"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import time; time.sleep(600)", "longer than 1 s"),
        ("import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)", "longer than 1 s"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "code -11"),
        ("raise SystemExit(2)", "code 2"),
        ("x = bytearray(1 << 30); print(len(x))", "code 1"),
        ("print('{')", "not in its form"),
        ("print('[]')", "not in its form"),
        ("print('[' * 100000)", "not in its form"),
        ("pass", "not in its form"),
        ("while True: print('x' * 100000)", "more than"),
        (VERDICT + "said['errors'] = [{}]; print(json.dumps(said))", "could not read"),
        (VERDICT + "said['paths']['scanned'] = []; print(json.dumps(said))", "left out"),
        (VERDICT + "said['results'][0]['path'] = 'code/other'; print(json.dumps(said))", "not in its form"),
    ],
)
async def test_whatever_goes_wrong_is_unscanned(tmp_path: Path, body: str, reason: str) -> None:
    timeout_s = 1 if "1 s" in reason else 20
    told = await scan(stand_in(tmp_path, body), timeout_s=timeout_s, memory_bytes=256 << 20)
    assert told["state"] == "unscanned"
    assert reason in told["reason"]


async def test_an_engine_that_is_not_there_is_unscanned(tmp_path: Path) -> None:
    told = await scan(tmp_path / "none")
    assert told["state"] == "unscanned"


async def test_it_is_cut_off_and_knows_nothing_of_us(
    tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRONGROOM_TEST_SECRET", "canary")
    out = tmp_path / "said.json"
    body = f"""
    import json, os, socket
    try:
        socket.create_connection(("192.0.2.1", 80), 2)
        reached = "yes"
    except OSError as err:
        reached = err.strerror
    names = [name for _, name in socket.if_nameindex()]
    where = os.getcwd()
    told = {{"reached": reached, "names": names, "env": dict(os.environ), "mode": os.stat(where).st_mode & 0o777}}
    open({str(out)!r}, "w").write(json.dumps(told | {{"where": where}}))
    """
    await scan(stand_in(tmp_path, body))
    told = json.loads(out.read_text())
    assert told["reached"] == "Network is unreachable"
    assert told["names"] == ["lo"]
    assert told["where"].startswith(str(shared))
    assert told["mode"] == 0o700
    assert set(told["env"]) <= {
        "PATH", "LANG", "LC_CTYPE", "HOME", "TMPDIR", "SEMGREP_SEND_METRICS", "SEMGREP_ENABLE_VERSION_CHECK"
    }  # fmt: skip


async def test_too_many_answers_and_a_stop_are_on_record_as_unscanned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deeper, "MAX_QUEUED", 2)
    told: list[dict[str, Any]] = []
    full = asyncio.Event()

    async def record(event: str, **fields: Any) -> None:
        told.append({"event": event, **fields})
        if len(told) == 5:
            full.set()

    scanner = DeeperScanner(stand_in(tmp_path, VERDICT + "print(json.dumps(said))"), timeout_s=20)
    for number in range(5):
        scanner.submit(f"req_{number}", ((PYTHON, "python"),))
    task = asyncio.create_task(scanner.run(record))
    await asyncio.wait_for(full.wait(), 60)
    states = {entry["request_id"]: entry["state"] for entry in told}
    assert states == {
        "req_0": "findings", "req_1": "findings", "req_2": "unscanned", "req_3": "unscanned", "req_4": "unscanned"
    }  # fmt: skip
    (tmp_path / "engine").write_text(f"#!{sys.executable}\nimport time; time.sleep(600)\n")
    scanner.submit("req_5", ((PYTHON, "python"),))
    scanner.submit("req_6", ((PYTHON, "python"),))
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [(entry["request_id"], entry["state"]) for entry in told[5:]] == [
        ("req_5", "unscanned"),
        ("req_6", "unscanned"),
    ]
    assert {entry["event"] for entry in told} == {"guard:answer:scanned"}


def second_record(kit: Any, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ask for code; return the record of the answer's end, and the one that came after it."""
    answer = httpx.post(
        kit.base + "/v1/chat/completions",
        json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 500},
        headers={"authorization": f"Bearer {key}"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    request_id = answer.headers["x-request-id"]

    def told() -> list[dict[str, Any]]:
        return [entry for entry in kit.entries() if entry.get("request_id") == request_id]

    wait_until(lambda: told()[-1]["event"] == "guard:answer:scanned", limit_s=90)
    assert [entry["event"] for entry in told()] == [
        "gateway:request:accepted",
        "gateway:request:finished",
        "guard:answer:scanned",
    ]
    return told()[1], told()[2]


def test_the_second_record_follows_the_answer(make_gateway: Any, tmp_path: Path) -> None:
    engine = stand_in(tmp_path, VERDICT + "print(json.dumps(said))")
    kit = make_gateway(guard={"deeper": str(engine), "deeper_timeout_ms": 20_000})
    kit.start()
    key = kit.new_key(groups={"developers"})
    kit.wait_for_key(key)
    kit.control(text=f"Here:\n```python\n{PYTHON}```\nDone.\n", num_tokens=100)
    _, entry = second_record(kit, key)
    assert (entry["engine"], entry["state"], entry["num_blocks"]) == ("semgrep", "findings", 1)
    assert entry["findings"][0]["rule"] == "own-rule"
    engine.write_text(f"#!{sys.executable}\nraise SystemExit(3)\n")
    _, entry = second_record(kit, key)
    assert (entry["state"], entry["reason"]) == ("unscanned", "the deeper engine ended with code 3")


@pytest.fixture(scope="module")
def semgrep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real engine, from a locked list, in an environment that is thrown away."""
    venv = tmp_path_factory.mktemp("semgrep") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*pip, "-r", str(Path(__file__).with_name("semgrep.txt"))], check=True)
    return venv / "bin" / "semgrep"


JAVASCRIPT = 'app.get("/", (req, res) => { const q = "select " + req.query.id; db.query(q); });\n'
JAVA = (
    "class A { void get(HttpServletRequest r) throws Exception {\n"
    ' String q = "select " + r.getParameter("id");\n st.executeQuery(q); } }\n'
)


@pytest.mark.slow
async def test_the_real_engine_tells_wrong_from_right(semgrep: Path) -> None:
    told = await scan(
        semgrep, (PYTHON, "python"), (SAFE, "python"), (JAVASCRIPT, "javascript"), (JAVA, "java"), timeout_s=120
    )
    assert told["state"] == "findings", told
    assert [(found["block"], found["rule"], found["line"]) for found in told["findings"]] == [
        (0, "deep-python-injection", 7),
        (2, "deep-javascript-injection", 1),
        (3, "deep-java-injection", 3),
    ]
    safe = await scan(
        semgrep,
        (SAFE, "python"),
        ('app.get("/", (req, res) => { db.query("select ?", [req.query.id]); });\n', "javascript"),
        (JAVA.replace('r.getParameter("id")', 'Integer.parseInt(r.getParameter("id"))'), "java"),
        timeout_s=120,
    )
    assert safe["state"] == "clean", safe
    broken = await scan(
        semgrep, ("import os\ndef f(:\n    name = input(\n    os.system(name\n", "python"), timeout_s=120
    )
    assert broken["state"] == "unscanned", broken
