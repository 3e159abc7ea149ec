"""What the soak calls flat, and what it does not."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.gateway import soak
from benchmarks.gateway.process import Held, children, held, held_by_tree

MIB = 2**20


def windows(memory=lambda n: 100 * MIB, fds=lambda n: 50, p99=lambda n: 20.0, count=24):
    return [
        soak.Window(n * 30.0, [10.0] * 98 + [p99(n)] * 2, Counter(), {"gateway": Held(int(memory(n)), fds(n))})
        for n in range(count)
    ]


def test_steady_run_is_flat():
    assert soak.judge(windows()) == []


def test_growth_in_the_first_minutes_is_no_fault():
    assert soak.judge(windows(memory=lambda n: (100 if n > 3 else 40 + 15 * n) * MIB)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"memory": lambda n: (100 + 4 * n) * MIB}, "memory rose"),
        ({"fds": lambda n: 50 + 2 * n}, "descriptors rose"),
        ({"p99": lambda n: 20.0 + 4 * n}, "p99 rose"),
        ({"count": 5}, "let it run longer"),
    ],
)
def test_what_does_not_stay_is_named(change, words):
    assert any(words in fault for fault in soak.judge(windows(**change)))


def test_failed_requests_are_a_fault():
    some = windows()
    some[3].errors["status 503"] += 1
    assert soak.judge(some) == ["requests failed: {'status 503': 1}"]


def test_memory_and_descriptors_of_this_process_are_told():
    before = held(os.getpid())
    assert before.memory_bytes > MIB
    with Path(os.devnull).open():
        assert held(os.getpid()).num_fds == before.num_fds + 1
    assert held_by_tree(os.getpid()).memory_bytes > 0
    assert os.getpid() in children(os.getppid())
    assert held(2**22 + 1) == Held(0, 0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_thousand_idle_streams_are_held_and_given_back(tmp_path):
    from benchmarks.gateway import idle

    assert idle.main(["--streams", "2000", "--hold", "12", "--state", str(tmp_path)]) == 0


def test_each_step_of_the_waterfall_is_a_policy_of_its_own(tmp_path):
    from server.policy.cedar import PolicySet

    controls = importlib.import_module("benchmarks.gateway.controls")  # untyped, as the load generator that it uses is
    controls.write_policies(tmp_path / "policy")
    rules = PolicySet.load(tmp_path / "policy").rules
    for number, (template, before, after) in enumerate(controls.STEPS.values()):
        wanted = rules[f"bench-{number}"].obligations
        assert (wanted.templates, wanted.scan_input, wanted.scan_output) == ((template,), before, after)
