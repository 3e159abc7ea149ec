"""Sweeps and tuning: plans, what is kept, what goes on where it stopped, the profile that is written."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.serving import sweep, tune
from benchmarks.serving.served import DEFAULT_CONFIG, ROOT, NotServedError, Served
from server.errors import ConfigError
from server.settings import load_settings


def test_plan_is_read():
    rates, settings = sweep.parse_plan(
        {
            "rates": [0.5, 2],
            "settings": [{"name": "a", "url": "http://h/v1"}, {"name": "b", "engine": {"dtype": "auto"}}],
        }
    )
    assert rates == [0.5, 2.0]
    assert [setting.name for setting in settings] == ["a", "b"]


@pytest.mark.parametrize(
    "plan",
    [None, {}, {"rates": [1], "settings": []}, {"rates": [], "settings": [{"name": "a"}]},
     {"rates": [0], "settings": [{"name": "a"}]}, {"rates": [True], "settings": [{"name": "a"}]},
     {"rates": [1, 1], "settings": [{"name": "a"}]}, {"rates": [1], "settings": [{"name": "a"}, {"name": "a"}]},
     {"rates": [1], "settings": [{"name": "a", "x": 1}]}, {"rates": [1], "settings": [{"name": "a", "engine": []}]},
     {"rates": [1], "settings": [{"name": "a", "url": "http://h", "engine": {"dtype": "auto"}}]},
     {"rates": list(range(1, 600)), "settings": [{"name": "a"}]}, {"rates": [1], "settings": ["a"]}],
)  # fmt: skip
def test_wrong_plan_is_refused(plan):
    with pytest.raises(ValueError, match=r"."):
        sweep.parse_plan(plan)


def engine_that_likes(**liked):
    """Requests of an engine that is quicker by a fifth for each setting it likes; some settings it can't start with."""

    def measure(engine):
        rng = random.Random(1)  # noqa: S311 - numbers to calculate with, no secrets
        if engine.get("max_num_seqs") == 666:
            raise NotServedError("the server did not start\nlog")
        flat = {**engine, **engine.get("extra_args", {})}
        seconds = 0.05 * 0.8 ** sum(flat.get(name) == value for name, value in liked.items())
        return [rng.gauss(seconds, seconds / 10) for _ in range(60)], {"output_tokens_per_s": round(1 / seconds, 1)}

    return measure


def test_what_helps_is_kept_and_nothing_else():
    tries = tune.parse_tries(["speculative_ngram=4,8", "--max-num-batched-tokens=512,2048", "max_num_seqs=666,8"])
    measure = engine_that_likes(**{"speculative_ngram": 8, "--max-num-batched-tokens": "512"})
    best, tried = tune.tune({"kv_cache_gib": 1}, tries, measure, lambda line: None)
    assert best == {"kv_cache_gib": 1, "speculative_ngram": 8, "extra_args": {"--max-num-batched-tokens": "512"}}
    assert [each.what for each in tried if each.kept] == [
        "as it was", "speculative_ngram=8", "--max-num-batched-tokens=512",
    ]  # fmt: skip
    refused = next(each for each in tried if each.what == "max_num_seqs=666")
    assert refused.row == {"refused": "the server did not start"}


def test_engine_that_does_not_start_as_it_is_is_an_error():
    with pytest.raises(NotServedError):
        tune.tune({"max_num_seqs": 666}, [], engine_that_likes(), lambda line: None)


@pytest.mark.parametrize("tries", ["speculative_ngram", "nothing=4", "=4", "speculative_ngram="])
def test_wrong_try_is_refused(tries):
    with pytest.raises(ValueError, match="is not NAME=VALUE"):
        tune.parse_tries([tries])


def test_an_interrupt_keeps_what_was_measured():
    seen = []

    def measure(engine):
        seen.append(engine)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return [1.0 / len(seen)] * 20, {}

    best, tried = tune.tune({}, tune.parse_tries(["speculative_ngram=4,8"]), measure, lambda line: None)
    assert best == {"speculative_ngram": 4}
    assert [(each.what, each.kept) for each in tried] == [("as it was", True), ("speculative_ngram=4", True)]


def test_profile_is_a_configuration_with_its_evidence(tmp_path):
    out = tmp_path / "deep" / "tuned.yaml"
    out.parent.mkdir()
    engine = {**yaml.safe_load(DEFAULT_CONFIG.read_text())["models"][0]["engine"], "speculative_ngram": 8}
    tried = [
        tune.Tried("as it was", {"output_tokens_per_s": 20}, None, kept=True),
        tune.Tried("speculative_ngram=8", {"output_tokens_per_s": 40}, (0.4, 0.6), kept=True),
        tune.Tried("max_num_seqs=666", {"refused": "did not start"}, None, kept=False),
    ]
    out.write_text(tune.profile_text(DEFAULT_CONFIG, out, engine, tried, "2 callers"))
    settings = load_settings(out)
    assert settings.models[0].engine.speculative_ngram == 8
    for folder, name in ((settings.policy, "policy"), (settings.templates, "templates"), (settings.guard, "guard")):
        assert folder.directory.resolve() == DEFAULT_CONFIG.parent / name
    text = out.read_text()
    assert "speculative_ngram=8: 0.400 to 0.600, 40 tokens/s" in text
    assert "did not start" in text


def test_served_configuration_has_the_replaced_settings(tmp_path):
    served = Served(tmp_path, engine={"speculative_ngram": 4}, model_path="models/other")
    settings = load_settings(served.write_config())
    assert settings.models[0].engine.speculative_ngram == 4
    assert settings.models[0].path.name == "other"
    assert settings.templates.directory.resolve() == DEFAULT_CONFIG.parent / "templates"
    with pytest.raises(ConfigError, match="speculative"):
        Served(tmp_path, engine={"speculative": 4}).write_config()


ENDED = """
import subprocess, sys, time
from pathlib import Path
from benchmarks.serving import served

started = subprocess.Popen
subprocess.Popen = lambda command, **options: started([sys.executable, "-c", "import time; time.sleep(600)"])
served.Served._wait = lambda self, log: print(self._process.pid, flush=True)
with served.Served(Path(sys.argv[1])):
    time.sleep(600)
"""


def test_a_benchmark_that_is_told_to_end_leaves_no_server_behind(tmp_path):
    command = [sys.executable, "-c", ENDED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) as bench:
        assert bench.stdout is not None
        server = int(bench.stdout.readline())
        bench.terminate()
        assert bench.wait(60) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


def test_tune_refuses_wrong_arguments_before_it_starts_anything(tmp_path):
    from server.cli import main

    out = tmp_path / "out.yaml"
    assert main(["tune", "--out", str(out), "--try", "nothing=4"]) == 1
    assert main(["tune", "--out", str(out), "--callers", "0"]) == 1
    assert not Path(out).exists()


def test_what_a_benchmark_prints_becomes_a_result():
    from benchmarks.rows import result_of

    lines = ['{"what": "raw", "per_s": 100, "p99_ms": 2.5, "n": 3}', '{"what": "raw", "per_s": 120, "p99_ms": 2}']
    output = "\n".join(["words", *lines, "{bad"])
    made = result_of("audit", ["--dir", "."], output)
    assert [(m.name, m.unit, m.better, m.value, m.labels) for m in made.measures] == [
        ("rate", "1/s", "higher", 100.0, {"what": "raw"}),
        ("p99", "ms", "lower", 2.0, {"what": "raw"}),
    ]
    assert made.measures[0].values == [100.0, 120.0]
    whole = result_of("guard", [], '{\n "token of prose, block (us)": 8.5\n}')
    assert (whole.measures[0].name, whole.measures[0].unit) == ("token of prose, block", "us")
    with pytest.raises(ValueError, match="printed no JSON rows"):
        result_of("guard", [], "nothing")


def test_bench_writes_a_result_of_what_was_printed(tmp_path, monkeypatch, capsys):
    from benchmarks.result import load_result
    from server.cli import main
    from server.commands import bench

    (tmp_path / "made_up_bench.py").write_text("print('{\"p50_ms\": 1.5}')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(bench.BENCHMARKS, "policy", "made_up_bench")
    path = tmp_path / "r.json"
    assert main(["bench", "--result", str(path), "policy"]) == 0
    assert capsys.readouterr().out == '{"p50_ms": 1.5}\n'
    assert load_result(path).measures[0].value == 1.5
    (tmp_path / "made_up_bench.py").write_text("print('words')\n")
    assert main(["bench", "--result", str(path), "policy"]) == 1
