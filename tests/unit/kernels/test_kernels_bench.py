"""The benchmark runs without a GPU, derives what it says it derives, and its timed calls work."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict

import pytest
import torch

from benchmarks.kernels import cases, derived, measure, report
from benchmarks.kernels.roofline import rooflines, to_result
from benchmarks.report import to_html
from benchmarks.result import load_result

DEVICE = derived.Device("toy", "sm_90", 10, 2.0, 1000.0, 50.0)


@pytest.mark.parametrize(
    ("opcode", "pipe"),
    [
        ("LOP3", ("alu", 1)),
        ("IMAD.WIDE", ("fma", 2)),
        ("IMAD.MOV", ("fma", 1)),
        ("LDG.128", ("lsu", 4)),
        ("SHFL", ("lsu", 1)),
        ("BRA", (None, 1)),
    ],
)
def test_opcodes_take_their_pipe(opcode, pipe):
    assert derived.pipe_of(opcode) == pipe


def test_the_busiest_pipe_decides():
    mix = Counter({"LOP3": 64, "FFMA": 32})
    found = derived.bound("k", DEVICE, mix, units=2, unit="bytes", bytes_moved=1)
    # 64 instructions of the 64-lane pipe for two units: half a clock each, on 10 multiprocessors at 2 GHz.
    assert found.compute == pytest.approx(10 * 2.0 / 0.5)
    assert (found.memory, found.rate, found.limit) == (1000.0, found.compute, "instructions (alu)")
    assert found.instructions == 48


def test_memory_decides_where_it_is_slower():
    found = derived.bound("k", DEVICE, Counter({"LOP3": 1}), units=64, unit="bytes", bytes_moved=100)
    assert (found.limit, found.rate) == ("device memory", 10.0)


def test_a_loop_counts_once_for_each_round():
    counts = {"instructions": {"LOP3": 10, "BRA": 1}, "loops": [{"LOP3": 4}]}
    assert derived.executed(counts, 3) == Counter({"LOP3": 18, "BRA": 1})


@pytest.fixture(scope="module")
def results(static_counts):
    static = list(static_counts.values())
    return {
        "kind": "derived",
        "environment": measure.environment(),
        "assumed_devices": [asdict(device) for device in derived.DEVICES],
        "assumed_lanes_per_clock": derived.LANES,
        "static": static,
        "derived": derived.derive(static),
        "measured": [],
    }


def test_opening_is_bound_far_above_the_link_on_every_device(results):
    for device in derived.DEVICES:
        bound = next(
            b for b in results["derived"] if (b["kernel"], b["device"]) == ("chacha20_poly1305.open", device.name)
        )
        assert 5 * device.link_gb_s < bound["rate"] < device.memory_gb_s / 3


def test_the_page_says_that_nothing_was_timed_and_needs_nothing_else(results):
    page = report.render(results)
    assert "nothing here was timed" in page
    assert "Derived, not measured" in page
    assert page.count("<svg") == len(derived.DEVICES)
    assert not any(mark in page for mark in ("http:", "https:", "src=", "href="))


def test_main_writes_both_files(results, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "collect", lambda: results)
    assert report.main(["--out", str(tmp_path / "out"), "--json"]) == 0
    written = json.loads((tmp_path / "out" / "kernels.json").read_text())
    assert json.loads(capsys.readouterr().out) == written
    assert written["settings"]["kind"] == "derived"
    result = load_result(tmp_path / "out" / "kernels.json")
    assert not result.measures  # nothing was measured
    assert {row["kind"] for row in result.rows} == {"derived"}
    page = to_html([result])
    assert page.count("derived, not measured") >= 2 * len(derived.DEVICES)
    assert page.count("what the device allows") >= 2 * len(derived.DEVICES)
    assert (tmp_path / "out" / "kernels.html").read_text().startswith("<!doctype html>")


def test_derived_points_say_so_and_none_stands_above_its_roof(results):
    found = rooflines(results)
    assert len(found) == 2 * len(derived.DEVICES)
    names = set()
    for roof in found:
        for point in roof["points"]:
            assert point["name"].endswith(", derived")
            names.add(point["name"].removesuffix(", derived"))
            allowed = min(roof["peak_flops"], point["flops_per_byte"] * roof["peak_bytes_per_s"])
            assert 0 < point["flops"] <= allowed * (1 + 1e-9)
    assert names >= {"chacha20_poly1305.open", "token_mask", "four_bit.multiply.nf4", "four_bit.multiply.int4"}


def test_what_was_measured_stands_beside_what_was_derived_on_its_own_device_only(results):
    row = {"kernel": "token_mask", "contender": "kernel", "shape": "s", "gb_s": 100.0, "dtype": "fp32"}
    row |= {"p20_ms": 0.1, "p50_ms": 0.2, "p80_ms": 0.3}
    copy = {**row, "contender": "masked_fill_"}
    timed = results | {"kind": "measured", "measured": [row, copy], "environment": {"device": "NVIDIA H100 80GB HBM3"}}
    by_title = {roof["title"]: roof["points"] for roof in rooflines(timed)}
    points = by_title["H100 SXM, opening and masking: derived, and measured here"]
    (point,) = [point for point in points if point["name"].endswith("measured")]
    per_byte = point["flops_per_byte"]
    assert point["flops"] == pytest.approx(100e9 * per_byte)
    assert per_byte == next(p["flops_per_byte"] for p in points if p["name"] == "token_mask, derived")
    assert sum("measured here" in title for title in by_title) == 1
    measures = to_result(timed).measures
    assert [(m.statistic, m.value, m.labels["contender"]) for m in measures[:3]] == [
        ("p20", 0.1, "kernel"), ("p50", 0.2, "kernel"), ("p80", 0.3, "kernel"),
    ]  # fmt: skip
    other = results | {"measured": [row], "environment": {"device": "NVIDIA H200"}}
    assert all("not measured" in roof["title"] for roof in rooflines(other))


def test_every_timed_call_runs_and_is_reported():
    runs = 0

    def timer(run):
        nonlocal runs
        run()
        runs += 1
        return 1.0, 2.0, 3.0

    rows = [row for case in cases.small_cases(torch.device("cpu")) for row in measure.measure(case, timer)]
    assert len(rows) == runs
    assert {row["kernel"] for row in rows} >= {"chacha20_poly1305.open", "token_mask", "four_bit.multiply.nf4.gated"}
    for row in rows:
        assert row["gb_s"] == pytest.approx(row["bytes_moved"] / 2e6)
        assert (row["p20_ms"], row["p50_ms"], row["p80_ms"]) == (1.0, 2.0, 3.0)


def test_measured_rows_reach_the_page(results):
    row = measure.measure(next(iter(cases.small_cases(torch.device("cpu")))), lambda _: (0.1, 0.2, 0.3))
    page = report.render(results | {"kind": "measured", "measured": row})
    assert "Timed on a GPU" in page
    assert "copy on the device" in page
