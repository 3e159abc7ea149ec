"""Attacks on the guard itself: odd fences, huge lines, control characters, dead workers. Never `clean` by accident."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from server.errors import ContentBlockedError
from server.guard.guard import Guard
from server.guard.scan import scan_text
from server.guard.workers import WorkerPool
from server.types import Chat, Delta, ModelRequest, Obligations, Outcome, ScanMode, ScanState, WireFormat

CODE = "import os\nos.system('ping ' + input())\n"
REQUEST = ModelRequest(WireFormat.CHAT, "m", Chat(({"role": "user", "content": "x"},)), {})
BAD = f"```python\n{CODE}```\n"


@pytest.mark.parametrize(
    "text",
    [
        f"```python\n{CODE}",
        f"~~~~\n{CODE}~~~~\n",
        f"````md\n```python\n{CODE}```\n````\n",
        "  * item\n\n      ```python\n      import os\n      os.system('ping ' + input())\n      ```\n",
        "> ```python\n> import os\n> os.system('ping ' + input())\n> ```\n",
        f"Look: ```python\n{CODE}```\n",
        f"no fence at all\n\n{CODE}",
        f"```text\n{CODE}```\n",
        f"```\n{CODE}```\n",
        BAD.replace("\n", "\r\n"),
        BAD.replace("\n", "\r"),
        BAD.replace("import os", "import os\0"),
        f"<pre><code>\n{CODE}</code></pre>\n",
        f"``` python title='x'\n{CODE}```\n",
        f"```PYTHON\n{CODE}```\n",
    ],
)
def test_fences_cannot_hide_code(text: str) -> None:
    assert scan_text(text).state is ScanState.FINDINGS


@pytest.mark.parametrize(
    "text",
    [
        "a" * 1_000_000,
        "password=" * 110_000,
        "x(" * 500_000,
        "`" * 1_000_000,
        "-" * 1_000_000,
        "<b>" * 300_000,
        "eyJ" * 300_000,
        "a:b@" * 250_000,
    ],
    ids=lambda t: t[:9],
)
def test_a_megabyte_on_one_line_ends_in_time(text: str) -> None:
    start = time.process_time()
    report = scan_text(text)
    assert time.process_time() - start < 25
    assert report.state in (ScanState.CLEAN, ScanState.FINDINGS, ScanState.UNSCANNED)


@pytest.mark.parametrize("label", ["ruby", "php", "rs", "C#", "powershell"])
def test_a_language_without_rules_is_unscanned_and_a_false_label_hides_nothing(label: str) -> None:
    report = scan_text(f"```{label}\nputs 1\n```\n")
    assert report.state is ScanState.UNSCANNED
    report = scan_text(f"```{label}\n{CODE}```\n")
    assert report.state is ScanState.UNSCANNED
    assert {f.rule for f in report.findings} == {"py-command-injection"}


def test_deep_nesting_is_unscanned_and_not_clean() -> None:
    assert scan_text("x = " + "(" * 5000 + ")" * 5000, language="python").state is ScanState.UNSCANNED


async def test_a_megabyte_in_small_pieces_is_released_in_time() -> None:
    guard = Guard(num_workers=1)

    async def deltas():
        for _ in range(40_000):
            yield [Delta(0, "abcdefgh ")]

    start = time.process_time()
    num_chars = 0
    async for batch in guard.release(deltas(), REQUEST, Obligations(scan_output=ScanMode.BLOCK), Outcome()):
        num_chars += sum(len(delta.text) for delta in batch)
    assert num_chars == 360_000
    assert time.process_time() - start < 20
    await guard.close()


async def test_a_killed_worker_gives_unscanned_and_is_replaced() -> None:
    pool = WorkerPool(num_workers=1, timeout_s=20)
    await pool.warm()
    os.kill(pool.pids[0], signal.SIGSTOP)
    asked = asyncio.ensure_future(pool.scan_code(CODE, "python"))
    await asyncio.sleep(0.05)
    os.kill(_children()[0], signal.SIGKILL)
    findings, reason = await asked
    assert findings == ()
    assert reason is not None
    findings, reason = await pool.scan_code(CODE, "python")
    assert reason is None
    assert findings
    await pool.close()


async def test_a_worker_that_hangs_gives_unscanned() -> None:
    pool = WorkerPool(num_workers=1, timeout_s=0.3)
    await pool.warm()
    os.kill(pool.pids[0], signal.SIGSTOP)
    findings, reason = await pool.scan_code(CODE, "python")
    assert findings == ()
    assert reason is not None
    assert "longer than" in reason
    await pool.close()


async def test_code_made_to_be_slow_gives_unscanned() -> None:
    pool = WorkerPool(num_workers=1, timeout_s=0.5)
    await pool.warm()
    source = "void f(){\n" + "  auto it = v.find(x);\n  delete p;\n  int *q = new int[3];\n" * 4000 + "}\n"
    start = time.monotonic()
    findings, reason = await pool.scan_code(source, "cpp")
    assert findings == ()
    assert reason is not None
    assert time.monotonic() - start < 10
    await pool.close()


async def test_a_worker_out_of_memory_gives_unscanned() -> None:
    pool = WorkerPool(num_workers=1, timeout_s=20, memory_bytes=1)
    findings, reason = await pool.scan_code(CODE, "python")
    assert findings == ()
    assert reason is not None
    await pool.close()


@pytest.mark.parametrize("mode", [ScanMode.BLOCK, ScanMode.REDACT, ScanMode.REPAIR, ScanMode.ANNOTATE])
async def test_unscanned_is_blocked_or_marked_and_never_clean(mode: ScanMode, tmp_path: Path) -> None:
    guard = Guard(num_workers=1, timeout_s=20, rules=tmp_path)  # no rules there: every worker dies at start
    outcome = Outcome()

    async def deltas():
        yield [Delta(0, BAD)]
        yield [Delta(0, finish_reason="stop")]

    released = guard.release(deltas(), REQUEST, Obligations(scan_output=mode), outcome)
    if mode is ScanMode.ANNOTATE:
        assert "".join([d.text async for batch in released for d in batch]) == BAD
    else:
        with pytest.raises(ContentBlockedError) as caught:
            [batch async for batch in released]
        assert caught.value.code == "content_unscanned"
    assert outcome.scan is not None
    assert outcome.scan.state is ScanState.UNSCANNED
    await guard.close()


def test_a_stop_string_inside_the_fence_is_scanned() -> None:
    assert scan_text("```python\nimport os\nos.system('rm ' + input()").state is ScanState.FINDINGS


def _children() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(stat.rsplit(")", 1)[1].split()[1]) == os.getpid() and b"server.guard.worker" in command:
                found.append(int(entry.name))
    return found
