"""The arithmetic of the benchmarks: intervals, arrivals, what a sample says, comparisons, results, reports."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import re
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import compare, report, result
from benchmarks.intervals import interval, percentile, ratio_interval, resampled, statistic_of
from benchmarks.plots import linear_axis, log_axis, percentile_points, waterfall
from benchmarks.result import Measure, Result, ResultError
from benchmarks.serving import arrivals, metrics, workloads
from benchmarks.serving.client import Answer, AnswerError, Target, read_stream
from benchmarks.serving.drive import Run, Sample
from benchmarks.serving.metrics import Limits

FACTS = result.facts()


def new_rng(seed):
    return random.Random(seed)  # noqa: S311 - numbers to calculate with, no secrets


def sample(**fields):
    return Sample(**{"workload": "edit", "due_s": 1.0, "sent_s": 1.25, "end_s": 3.0, **fields})


def made(measures, **fields):
    return result.finish(Result("serve", {"seed": 1}, measures, **fields))


# Statistics -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_is_a_value_that_enough_values_do_not_exceed(values, percent):
    found = percentile(sorted(values), percent)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100 - 1e-6


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = new_rng(7)
    truth = {"mean": 1.0, "p50": math.log(2)}
    for name, value in truth.items():
        hits = 0
        for round_number in range(200):
            low, high = interval([rng.expovariate(1) for _ in range(100)], name, seed=round_number)
            hits += low <= value <= high
        assert 174 <= hits <= 200  # 95 % of 200 is 190; below 174 comes once in a million


def test_quick_resample_of_a_percentile_is_what_drawing_every_value_gives():
    rng = new_rng(3)
    values = [rng.gauss(10, 2) for _ in range(80)]
    quick = resampled(values, "p90", rounds=4000)
    slow = [statistic_of(rng.choices(values, k=80), "p90") for _ in range(4000)]
    assert statistics.mean(quick) == pytest.approx(statistics.mean(slow), rel=0.01)
    assert statistics.stdev(quick) == pytest.approx(statistics.stdev(slow), rel=0.1)


@pytest.mark.parametrize("name", ["median", "p", "p101", "p-1", ""])
def test_unknown_statistic_is_refused(name):
    with pytest.raises(ValueError, match="is not mean"):
        resampled([1.0], name)


def test_ratio_interval_holds_the_ratio():
    rng = new_rng(5)
    a, b = ([rng.gauss(centre, 1) for _ in range(300)] for centre in (10, 12))
    low, high = ratio_interval(a, b, "mean")
    assert low < 1.2 < high
    assert high - low < 0.1


# Arrivals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["poisson", "uniform", "burst:8"])
def test_arrivals_come_at_the_mean_rate_in_order_and_are_the_same_for_a_seed(kind):
    moments = [arrival.at_s for arrival in arrivals.arrivals(kind, 50, 200, seed=1)]
    assert moments == sorted(moments)
    assert 0 <= moments[0] <= moments[-1] <= 200
    assert len(moments) == pytest.approx(10_000, rel=0.1)
    assert moments == [arrival.at_s for arrival in arrivals.arrivals(kind, 50, 200, seed=1)]
    if kind != "uniform":
        assert moments != [arrival.at_s for arrival in arrivals.arrivals(kind, 50, 200, seed=2)]


def test_poisson_gaps_vary_as_much_as_they_last():
    moments = [arrival.at_s for arrival in arrivals.arrivals("poisson", 50, 200, seed=1)]
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.1)


def test_bursts_come_at_once():
    moments = [arrival.at_s for arrival in arrivals.arrivals("burst:8", 50, 20, seed=1)]
    assert len(moments) % 8 == 0
    assert len(set(moments)) == len(moments) // 8


@pytest.mark.parametrize(
    ("kind", "rate", "seconds"),
    [("burst:0", 1, 1), ("burst:x", 1, 1), ("gauss", 1, 1), ("poisson:2", 1, 1), ("poisson", 0, 1),
     ("poisson", math.inf, 1), ("poisson", math.nan, 1), ("poisson", 1e6, 1e6)],
)  # fmt: skip
def test_impossible_arrivals_are_refused(kind, rate, seconds):
    with pytest.raises(ValueError, match=r"above 0|bursts are given|is not poisson|more than"):
        arrivals.arrivals(kind, rate, seconds, seed=0)


def test_trace_is_read_with_and_without_bodies():
    lines = [b'{"at_s": 0}', b"", b'{"at_s": 1.5, "workload": "fim"}',
             b'{"at_s": 1.5, "route": "completions", "body": {"prompt": "x", "stream": true}}']  # fmt: skip
    first, second, third = arrivals.parse_trace(iter(lines))
    assert (first.at_s, first.request, first.workload) == (0.0, None, None)
    assert (second.at_s, second.workload) == (1.5, "fim")
    assert third.request is not None
    assert (third.request.route, third.request.stream) == ("completions", True)
    assert json.loads(third.request.body)["prompt"] == "x"


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b'{"at_s": -1}', b'{"at_s": true}', b'{"at_s": 1, "x": 2}', b'{"at_s": 1, "workload": "x"}',
     b'{"at_s": 1, "body": {}}', b'{"at_s": 1, "route": "embeddings", "body": {}}', b'{"at_s": 0.5}'],
)  # fmt: skip
def test_wrong_trace_is_refused_by_line(line):
    with pytest.raises(ValueError, match="line 2:"):
        list(arrivals.parse_trace(iter([b'{"at_s": 0.75}', line])))


@given(st.lists(st.binary(max_size=60), max_size=5))
def test_any_trace_is_read_or_refused(lines):
    try:
        found = list(arrivals.parse_trace(iter(lines)))
    except ValueError as err:
        refusal = str(err)
    else:
        refusal = "line 0: none"
        assert all(arrival.at_s >= 0 for arrival in found)
    assert re.match(r"line \d+: ", refusal)


# Workloads ------------------------------------------------------------------------------------------------------------


def bodies(name, count=12, **options):
    made = workloads.requests({name: 1.0}, workloads.Options("m", **options), seed=4)
    return [(request, json.loads(request.body)) for request, _ in zip(made, range(count), strict=False)]


@pytest.mark.parametrize("name", list(workloads.WORKLOADS))
def test_workload_is_bounded_and_the_same_for_a_seed(name):
    first = bodies(name, max_prompt_chars=3000)
    assert [body for _, body in first] == [body for _, body in bodies(name, max_prompt_chars=3000)]
    for request, body in first:
        assert request.workload == name
        text = body.get("prompt", "") + body.get("suffix", "")
        text += "".join(message["content"] for message in body.get("messages", []))
        assert 100 < len(text) < 3600
        assert body["stream_options"] == {"include_usage": True}
    assert len({request.body for request, _ in first}) > 8


def test_agent_prompts_begin_with_the_one_before():
    turns = [body["messages"] for _, body in bodies("agent", 16)]
    grown = [after[: len(before)] == before for before, after in itertools.pairwise(turns)]
    assert sum(grown) >= 12
    assert not all(grown)


def test_cursor_is_sent_as_suffix_or_in_the_models_own_form():
    _, body = bodies("fim", 1)[0]
    assert body["prompt"]
    assert body["suffix"]
    _, marked = bodies("fim", 1, fim="<P>{prefix}<S>{suffix}<M>")[0]
    assert marked["prompt"] == f"<P>{body['prompt']}<S>{body['suffix']}<M>"
    assert "suffix" not in marked


@pytest.mark.parametrize("given_mix", ["", "edit=0", "edit=x", "edit=inf", "nothing", "edit=1,,fim=1"])
def test_wrong_mix_is_refused(given_mix):
    with pytest.raises(ValueError, match="is not a workload"):
        workloads.parse_mix(given_mix)


# Reading an answer ----------------------------------------------------------------------------------------------------

EVENTS = [
    b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n',
    b'event: x\ndata: {"choices":[{"delta":{"content":"a"}}]}\n\n',
    b': a comment\n\ndata: {"choices":[{"delta":{"reasoning_content":"b"}}]}\r\n\r\n',
    b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5,"prompt_tokens_details":null}}\n\n',
    b"data: [DONE]\n\n",
]


@given(st.lists(st.integers(0, len(b"".join(EVENTS))), max_size=20))
def test_stream_is_read_however_it_is_cut(cuts):
    whole = b"".join(EVENTS)
    places = [0, *sorted(cuts), len(whole)]
    pieces = [(float(n), whole[a:b]) for n, (a, b) in enumerate(itertools.pairwise(places), 1)]
    answer = read_stream(pieces, 0.0)
    assert (answer.text, answer.finish_reason, answer.prompt_tokens, answer.output_tokens) == ("ab", "stop", 7, 5)
    assert len(answer.texts_s) == 2
    assert answer.tokens_from_usage
    assert answer.texts_s == sorted(answer.texts_s)


def test_role_alone_is_not_the_first_token():
    pieces = [(float(n), event) for n, event in enumerate(EVENTS)]
    assert read_stream(pieces, 0.0).texts_s == [1.0, 2.0]


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [(EVENTS[:3], "stream cut"), ([b'data: {"error":{"message":"x"}}\n\n'], "error event"),
     ([b"data: {\n"], "not an event"),
     ([b'data: {"choices":[1]}\n'], "not an event"), ([b"data: 3\n"], "not an event"), ([], "stream cut")],
)  # fmt: skip
def test_broken_stream_is_an_error_of_its_kind(pieces, kind):
    with pytest.raises(AnswerError, match=kind):
        read_stream([(0.0, piece) for piece in pieces], 0.0)


@given(st.lists(st.binary(max_size=50), max_size=4))
def test_any_stream_is_an_answer_or_an_error(pieces):
    try:
        answer = read_stream([(0.0, piece) for piece in pieces], 0.0)
    except AnswerError:
        return
    assert isinstance(answer, Answer)


def test_target_hides_the_key_and_refuses_what_it_cannot_reach():
    target = Target.parse("http://h:81/v1/", key="sr_secret")
    assert (target.host, target.port, target.path) == ("h", 81, "/v1")
    assert "sr_secret" not in repr(target) + target.label
    assert Target.parse("unix:///run/e.sock").uds == "/run/e.sock"
    for url in ("h:81", "ftp://h/", "http:///v1", "http://user:pw@h/v1", "unix://"):
        with pytest.raises(ValueError, match="must look like"):
            Target.parse(url)


# What a sample says ---------------------------------------------------------------------------------------------------


def test_latencies_count_from_the_due_moment():
    one = sample(texts_s=[1.5, 2.0, 2.75], output_tokens=6)
    assert one.ttft_s == pytest.approx(0.5)  # and not 0.25 from when it was sent
    assert one.e2e_s == pytest.approx(2.0)
    assert one.tpot_s == pytest.approx(1.25 / 5)  # by tokens: an event may hold several
    assert one.gaps_s == pytest.approx([0.5, 0.75])


def test_single_token_has_no_time_per_token():
    assert sample(texts_s=[1.5], output_tokens=1).tpot_s is None
    assert sample().ttft_s is None


def test_failed_request_is_counted_and_never_good():
    run = Run(0.0, end_s=4.0, last_due_s=4.0)
    run.samples = [sample(texts_s=[1.5, 2.0], output_tokens=2), sample(error="status 503"), sample(error="timeout")]
    found = {(m.name, m.statistic): m.value for m in metrics.measures(run, Limits())}
    assert found["goodput", "total"] == pytest.approx(1 / 4)
    assert found["error_share", "total"] == pytest.approx(2 / 3)
    assert found["requests", "mean"] == pytest.approx(1 / 4)
    assert metrics.error_counts(run.samples) == {"status 503": 1, "timeout": 1}
    assert metrics.row(run, Limits())["failed"] == 2


def test_warm_up_is_left_out():
    run = Run(2.0, end_s=4.0, last_due_s=4.0)
    run.samples = [sample(due_s=0.5, error="timeout"), sample(due_s=2.5, texts_s=[2.75], output_tokens=1)]
    found = {(m.name, m.statistic): m.value for m in metrics.measures(run, Limits())}
    assert found["error_share", "total"] == 0
    assert found["ttft", "p50"] == pytest.approx(250)
    assert found["requests", "mean"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("limits", "kept"),
    [(["ttft:501"], True), (["ttft:499"], False), (["e2e:1999"], False), (["tpot:249"], False),
     (["tpot:251", "e2e:2001", "ttft:501"], True)],
)  # fmt: skip
def test_goodput_wants_every_limit_kept(limits, kept):
    assert Limits.parse(limits).are_kept(sample(texts_s=[1.5, 2.0, 2.75], output_tokens=6)) is kept


@pytest.mark.parametrize("limit", ["ttft", "ttft:0", "ttft:x", "itl:5", "ttft:-1", "ttft:nan"])
def test_wrong_limit_is_refused(limit):
    with pytest.raises(ValueError, match="is not a limit"):
        Limits.parse([limit])


# Results and comparisons ----------------------------------------------------------------------------------------------


def measure(values, name="ttft", better="lower", **fields):
    value, bounds = statistic_of(values, "p50"), interval(values, "p50")
    return Measure(name, "ms", better, "p50", value, bounds, values=values, **fields)


def test_result_comes_back_as_it_was_written(tmp_path):
    before = made([measure([1.0, 2.0], labels={"rate": "4"}), Measure("x", "1", "higher", "total", math.nan)],
                  rows=[{"rate": "4", "requests_per_s": 3.5}])  # fmt: skip
    path = tmp_path / "r.json"
    result.write_result(before, path)
    after = result.load_result(path)
    assert after.measures[0] == before.measures[0]
    assert math.isnan(after.measures[1].value)
    assert (after.rows, after.settings, after.machine) == (before.rows, before.settings, before.machine)
    assert {"architecture", "cpu", "num_cpus", "memory_bytes", "kernel", "python"} <= set(after.machine)
    assert after.versions["strongroom"]
    assert after.commit


@pytest.mark.parametrize(
    ("change", "words"),
    [({"schema": "x/1"}, "expected 'strongroom-benchmark/1'"), ({"machine": None}, "field 'machine'"),
     ({"measures": [{"name": "x"}]}, "lacks"), ({"measures": [[]]}, "lacks"),
     ({"measures": [{"name": "x", "unit": "1", "better": "big", "statistic": "total", "value": 1}]}, "lower or higher"),
     ({"measures": [{"name": "x", "unit": "1", "better": "lower", "statistic": "total", "value": "1"}]}, "numbers")],
)  # fmt: skip
def test_other_file_is_refused_with_the_reason(tmp_path, change, words):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({**result.to_json(made([])), **change}))
    with pytest.raises(ResultError, match=re.escape(words)) as caught:
        result.load_result(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_file_that_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(ResultError, match=r"r\.json"):
        result.load_result(path)
    with pytest.raises(ResultError, match="can't be read"):
        result.load_result(tmp_path / "missing.json")


def noisy(centre, seed):
    rng = new_rng(seed)
    return [rng.gauss(centre, 10) for _ in range(400)]


def files(tmp_path, a, b):
    paths = []
    for name, measures in (("a", a), ("b", b)):
        paths.append(str(tmp_path / f"{name}.json"))
        result.write_result(made(measures), tmp_path / f"{name}.json")
    return paths


@pytest.mark.parametrize(
    ("better", "centre", "margin", "code"),
    [("lower", 100, "5", 0), ("lower", 120, "5", 1), ("lower", 120, "30", 0), ("lower", 60, "5", 0),
     ("higher", 80, "5", 1), ("higher", 120, "5", 0), ("higher", 80, "30", 0)],
)  # fmt: skip
def test_regression_beyond_margin_and_chance_is_exit_code_1(tmp_path, better, centre, margin, code):
    paths = files(tmp_path, [measure(noisy(100, 1), better=better)], [measure(noisy(centre, 2), better=better)])
    assert compare.main([*paths, "--margin", margin]) == code


def test_difference_that_may_be_chance_is_no_regression(tmp_path):
    rng = new_rng(1)
    a, b = ([rng.gauss(centre, 60) for _ in range(12)] for centre in (100, 112))
    assert compare.main([*files(tmp_path, [measure(a)], [measure(b)]), "--margin", "0"]) == 0


def test_errors_where_there_were_none_are_a_regression(tmp_path):
    a, b = (Measure("error_share", "1", "lower", "total", value) for value in (0.0, 0.2))
    assert compare.main(files(tmp_path, [a], [b])) == 1
    assert compare.main(files(tmp_path, [b], [a])) == 0


def test_results_without_a_common_measure_are_exit_code_2(tmp_path, capsys):
    assert compare.main(files(tmp_path, [measure([1.0])], [measure([1.0], name="e2e")])) == 2
    assert "no measure in common" in capsys.readouterr().err
    a = made([measure([1.0])])
    with pytest.raises(ResultError, match="different benchmarks"):
        compare.compare(a, dataclasses.replace(a, benchmark="gateway"), margin=0.05)


# Pictures -------------------------------------------------------------------------------------------------------------


@given(st.floats(1e-9, 1e15))
def test_axes_hold_every_value(highest):
    axis = linear_axis("x", highest)
    assert axis.low == 0
    assert axis.high >= highest * 0.999
    assert 2 <= len(axis.ticks) <= 12
    decades = log_axis("x", highest / 50, highest)
    assert decades.place(highest / 50) >= -1e-9
    assert decades.place(highest) <= 1 + 1e-9


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=2000))
def test_percentile_curve_never_falls(values):
    points = percentile_points(values)
    assert [y for _, y in points] == sorted(y for _, y in points)
    assert len(points) <= 400


def test_report_needs_nothing_else_and_lets_no_markup_in():
    hostile = '<script>alert("x")</script>'
    runs = [{"rate": str(rate), "requests_per_s": rate, "ttft_p50_ms": 5.0, "ttft_p90_ms": 9.0, "ttft_p99_ms": 700.0}
            for rate in (1, 2, 4)]  # fmt: skip
    roof = {"title": hostile, "peak_flops": 1e15, "peak_bytes_per_s": 3e12,
            "points": [{"name": hostile, "flops_per_byte": 2, "flops": 1e12}]}  # fmt: skip
    fall = {"title": hostile, "unit": "ms", "steps": [{"name": hostile, "value": 2}, {"name": "guard", "value": -0.5}]}
    page = report.to_html(
        [made([measure([1.0, 2.0, 3.0], labels={hostile: hostile})], rows=[*runs, {"rate": hostile}],
              details={"rooflines": [roof], "waterfalls": [fall]})]
    )  # fmt: skip
    assert "<script" not in page
    assert page.count("<svg") == 4
    assert not re.search(r"""(src|href|url\()\s*=?\s*["']?(https?:)?//""", page)


def test_report_shows_what_a_result_says_and_folds_long_tables_away():
    minutes = [{"minute": n / 2, "p99_ms": 20.0 + n, "gateway_mib": 180.0, "answers": n} for n in range(40)]
    page = report.to_html([made([measure([1.0, 2.0, 3.0])], rows=minutes)])
    assert "<details open><summary>1 measure with intervals" in page
    assert "<details><summary>40 rows" in page
    assert "Latency over the run" in page
    assert "Memory over the run" in page
    table = report.to_html([made([], rows=[{"step": "template", "p50_ms": 1.5, "empty": ""}])])
    assert '<td class="words">template</td><td>1.5</td>' in table
    assert "empty" not in table


def test_waterfall_ends_at_the_sum():
    assert "together" in waterfall("t", "ms", [("engine", 1.0), ("guard", 0.5)])
    assert "1.5 ms" in waterfall("t", "ms", [("engine", 1.0), ("guard", 0.5)])
