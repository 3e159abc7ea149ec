"""Our numbers against AIPerf's on the same server: what both measure must agree within 5 %.

AIPerf comes from PyPI into an environment of its own, pinned in `benchmarks/peers/aiperf.txt`; it is 1.2 GB, so this is
`slow`. Its request latency ends with the last text, ours (`last_text`) too.
`STRONGROOM_AIPERF` may name the Python of an environment that has it already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gateway.kit import free_port, tokenizer_files, wait_until
from benchmarks.result import load_result
from benchmarks.serving import serve

ROOT = Path(__file__).resolve().parents[2]
CALLERS, REQUESTS, TOKENS = 4, 48, 16
FIRST_MS, EACH_MS = 400, 60
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def aiperf(tmp_path):
    if named := os.environ.get("STRONGROOM_AIPERF"):
        return Path(named).parent / "aiperf"
    folder = tmp_path / "aiperf"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    wanted = str(ROOT / "benchmarks" / "peers" / "aiperf.txt")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--require-hashes", "-r", wanted]
    subprocess.run(pip, check=True)
    return folder / "bin" / "aiperf"


@pytest.fixture
def port():
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.instant_engine", "--port", str(port), "--model", "m"]
    engine = subprocess.Popen([*command, "--num-tokens", str(TOKENS), "--delay-ms", str(EACH_MS)], cwd=ROOT)
    try:
        import httpx

        wait_until(lambda: httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200)
        httpx.post(f"http://127.0.0.1:{port}/control", json={"first_delay_ms": FIRST_MS}).raise_for_status()
        yield port
    finally:
        engine.terminate()
        engine.wait(20)


def ours(port, tmp_path):
    path = tmp_path / "ours.json"
    argv = ["--url", f"http://127.0.0.1:{port}/v1", "--model", "m", "--callers", str(CALLERS), "--warm-up", "0"]
    assert serve.main([*argv, "--requests", str(REQUESTS), "--duration", "300", "--json", str(path)]) == 0
    return {
        m.name: m.value for m in load_result(path).measures if m.statistic in ("p50", "total")
    } | {m.name: m.value for m in load_result(path).measures if m.unit == "1/s" and m.statistic == "mean"}  # fmt: skip


def theirs(program, port, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    for name, content in tokenizer_files().items():
        (tokenizer / name).write_bytes(content)
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "tokenizer_config.json").write_text(
        json.dumps(config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    out = tmp_path / "artifacts"
    done = subprocess.run(
        [str(program), "profile", "--model", "m", "--url", f"http://127.0.0.1:{port}", "--endpoint-type", "chat",
         "--streaming", "--concurrency", str(CALLERS), "--request-count", str(REQUESTS), "--tokenizer", str(tokenizer),
         "--use-server-token-count", "--ui", "none", "--output-artifact-dir", str(out)],
        capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((out / "profile_export_aiperf.json").read_text())
    return {
        "ttft": found["time_to_first_token"]["p50"],
        "tpot": found["inter_token_latency"]["p50"],
        "last_text": found["request_latency"]["p50"],
        "requests": found["request_throughput"]["avg"],
        "output_tokens": found["output_token_throughput"]["avg"],
    }


def test_aiperf_measures_the_same(aiperf, port, tmp_path, record_property):
    """A machine that others use may part any one pair of runs; what differs by nature parts all three."""
    pairs = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        there, here = theirs(aiperf, port, folder), ours(port, folder)
        pairs.append({name: (here[name], value) for name, value in there.items()})
        print(pairs[-1])
        if all(ours == pytest.approx(others, rel=0.05) for ours, others in pairs[-1].values()):
            break
    else:
        pytest.fail(f"here and by AIPerf: {pairs}")
    record_property("pairs", json.dumps(pairs))
