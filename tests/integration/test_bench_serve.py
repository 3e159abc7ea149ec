"""`strongroom bench serve` against a server whose delays are known."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.instant_engine import Engine, Script
from benchmarks.instant_engine import serve as serve_engine
from benchmarks.result import load_result
from benchmarks.serving import drive, serve, sweep
from benchmarks.serving.arrivals import Arrival
from benchmarks.serving.client import Client, Target
from benchmarks.serving.workloads import Options, requests

ROOT = Path(__file__).resolve().parents[2]


class Server:
    """The instant engine on a thread of its own; `script` may be changed while it runs."""

    def __init__(self) -> None:
        self.engine = Engine("m", 8192, Script(num_tokens=8))
        self.port = 0
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(20)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(serve_engine(self.engine, uds=None, port=0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(asyncio.sleep(0.05))  # what the client cut is closed here too
        self._loop.close()

    def stall(self, seconds: float) -> None:
        """Answer nobody for a while."""
        import time

        self._loop.call_soon_threadsafe(time.sleep, seconds)

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


def bench(server, tmp_path, *argv):
    path = tmp_path / "result.json"
    code = serve.main(
        ["--url", server.url, "--model", "m", "--warm-up", "0.3", "--duration", "1.2", "--json", str(path), *argv]
    )
    return code, load_result(path) if path.exists() else None


def values(result):
    return {(m.name, m.statistic): m.value for m in result.measures}


@pytest.mark.parametrize("how", [["--rate", "30"], ["--callers", "4"], ["--rate", "30", "--arrivals", "burst:4"]])
def test_known_delays_are_measured(server, tmp_path, how):
    server.engine.script = Script(num_tokens=10, first_delay_ms=40, delay_ms=8)
    code, result = bench(server, tmp_path, *how, "--html", str(tmp_path / "r.html"))
    assert code == 0
    found = values(result)
    # Nothing may be reported as faster than it can have been; how much slower is the machine's own affair.
    assert found["ttft", "p50"] >= 40
    assert found["tpot", "p50"] >= 8
    assert found["e2e", "p50"] >= 40 + 10 * 8
    assert found["error_share", "total"] == 0
    assert found["output_tokens", "mean"] == pytest.approx(10 * found["requests", "mean"], rel=1e-6)
    assert result.settings["corpus_sha256"]
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_plain_answers_are_measured_too(server, tmp_path):
    code, result = bench(server, tmp_path, "--callers", "2", "--no-stream", "--workload", "fim")
    assert code == 0
    found = values(result)
    assert ("ttft", "p50") not in found
    assert found["e2e", "p50"] > 0
    assert server.engine.last_path == "/v1/completions"


@pytest.mark.parametrize(
    ("script", "kind"),
    [(Script(status=503), "status 503"), (Script(error_after=2), "error event"),
     (Script(cut_after=2), "connection lost"), (Script(hang_after=2), "not answered")],
)  # fmt: skip
def test_failures_are_counted_by_kind_and_end_in_exit_code_3(server, tmp_path, capsys, script, kind):
    server.engine.script = script
    code, result = bench(server, tmp_path, "--rate", "20", "--drain", "0.2")
    assert code == 3
    assert values(result)["error_share", "total"] == 1
    assert set(result.details["runs"][0]["errors"]) == {kind}
    assert kind in capsys.readouterr().err
    assert bench(server, tmp_path, "--rate", "20", "--drain", "0.2", "--max-errors", "1")[0] == 0


def test_nobody_there_is_an_error_and_not_a_hang(server, tmp_path):
    server.close()
    code, result = bench(server, tmp_path, "--callers", "2")
    assert code == 3
    assert set(result.details["runs"][0]["errors"]) == {"no connection"}


async def test_stall_is_charged_to_every_request_that_was_due_in_it(server):
    """Coordinated omission: with one request in flight, a loop that counts from sending sees one slow request."""
    client = Client(Target.parse(server.url), timeout_s=30)
    schedule = [Arrival(0.05 * n) for n in range(1, 21)]
    loop = asyncio.get_running_loop()
    loop.call_later(0.2, server.stall, 0.6)
    try:
        run = await drive.open_loop(
            client, schedule, requests({"edit": 1.0}, Options("m"), seed=0), warm_s=0, duration_s=1.0, max_in_flight=1
        )
    finally:
        client.close()
    assert len(run.samples) == 20
    assert all(sample.error is None for sample in run.samples)
    slow_by_due = [sample for sample in run.samples if sample.e2e_s > 0.1]
    slow_by_sent = [sample for sample in run.samples if sample.end_s - sample.sent_s > 0.1]
    assert len(slow_by_due) >= 8
    assert len(slow_by_sent) <= 2


async def test_what_could_not_be_sent_is_counted(server):
    server.engine.script = Script(first_delay_ms=10_000)
    client = Client(Target.parse(server.url), timeout_s=30)
    schedule = [Arrival(0.01 * n) for n in range(1, 11)]
    run = await drive.open_loop(
        client,
        schedule,
        requests({"edit": 1.0}, Options("m"), seed=0),
        warm_s=0,
        duration_s=0.2,
        max_in_flight=3,
        drain_s=0.2,
    )
    client.close()
    assert sorted(str(sample.error) for sample in run.samples) == ["not answered"] * 3 + ["not sent"] * 7


def test_trace_is_replayed(server, tmp_path):
    path = tmp_path / "trace.jsonl"
    body = {"model": "m", "messages": [{"role": "user", "content": "recorded"}], "stream": True}
    lines = [{"at_s": 0.05 * n, "route": "chat/completions", "body": body} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, lines)))
    code, result = bench(server, tmp_path, "--trace", str(path), "--warm-up", "0")
    assert code == 0
    assert result.rows[0]["requests"] == 20
    assert server.engine.last_body["messages"][0]["content"] == "recorded"


def test_search_ends_between_a_rate_that_keeps_the_limits_and_one_that_breaks_them(server, tmp_path):
    # 40 ms an answer, at most 4 at a time: the server's limit is about 100 a second.
    server.engine.script = Script(num_tokens=2, first_delay_ms=40)
    argv = ["--search", "--from-rate", "40", "--goodput", "e2e:400", "--max-in-flight", "4", "--warm-up", "0.2"]
    code, result = bench(server, tmp_path, *argv)
    assert code == 0
    highest = values(result)["highest_rate", "total"]
    tried = {float(row["rate"]): row["good_share"] for row in result.rows}
    assert tried[highest] >= 0.95
    assert min(rate for rate, share in tried.items() if share < 0.95) > highest


@pytest.mark.parametrize(
    "argv",
    [["--rate", "0"], ["--callers", "0"], ["--rate", "1", "--duration", "0"], ["--search"], ["--goodput", "x:1"],
     ["--workload", "none"], ["--arrivals", "never"], ["--trace", "missing.jsonl"], ["--url", "nowhere"],
     ["--fim", "{prefix}"], ["--max-prompt-chars", "10"]],
)  # fmt: skip
def test_wrong_use_is_exit_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        serve.main(["--url", "http://127.0.0.1:9/v1", "--model", "m", *argv])
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_command_takes_the_address_from_the_environment_and_never_writes_the_key(server, tmp_path):
    env = {**os.environ, "OPENAI_BASE_URL": server.url, "MODEL": "m", "OPENAI_API_KEY": "sr_" + "k" * 30}
    path = tmp_path / "r.json"
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "bench", "serve", "--callers", "1", "--requests", "3", "--warm-up", "0",
         "--json", str(path), "--html", str(tmp_path / "r.html")],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert load_result(path).rows[0]["requests"] == 3
    assert env["OPENAI_API_KEY"] not in done.stdout + done.stderr + path.read_text() + (tmp_path / "r.html").read_text()


def test_sweep_goes_on_where_it_stopped(server, tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    other = Server()
    grid = [{"name": "here", "url": server.url}, {"name": "there", "url": other.url}]
    plan.write_text(json.dumps({"rates": [10, 20], "settings": grid}))
    path, page = tmp_path / "sweep.json", tmp_path / "sweep.html"
    argv = ["--plan", str(plan), "--model", "m", "--duration", "0.6", "--warm-up", "0", "--json", str(path)]
    assert sweep.main([*argv, "--html", str(page)]) == 0
    first = load_result(path)
    assert [(row["settings"], row["rate"]) for row in first.rows] == [
        ("here", "10"), ("here", "20"), ("there", "10"), ("there", "20"),
    ]  # fmt: skip
    assert page.read_text().count("<svg") >= 3
    asked = other.engine.num_finished
    # Cut off after three cells: the fourth is measured again, and nothing else.
    cut = json.loads(path.read_text())
    cut["rows"] = cut["rows"][:3]
    cut["measures"] = [m for m in cut["measures"] if m["labels"] != {"settings": "there", "rate": "20"}]
    path.write_text(json.dumps(cut))
    here = server.engine.num_finished
    assert sweep.main(argv) == 0
    assert server.engine.num_finished == here
    assert other.engine.num_finished > asked
    again = load_result(path)
    assert again.rows[:3] == first.rows[:3]
    assert len(again.rows) == 4
    assert len(again.measures) == len(first.measures)
    with pytest.raises(SystemExit):
        sweep.main([*argv, "--seed", "9"])  # other requests must not be mixed in
    assert "name a new file" in capsys.readouterr().err
    other.close()
