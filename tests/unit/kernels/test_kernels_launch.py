"""Launch shapes are pure functions of sizes."""

from __future__ import annotations

import os

import pytest

from serving_kernels import launch


@pytest.mark.parametrize("chunk_bytes", [0, 1, 64, 4096, 1 << 20, 1 << 30])
def test_lanes_are_powers_of_two_within_limits(chunk_bytes):
    for interpreted in (True, False):
        plan = launch.open_plan(chunk_bytes, interpreted=interpreted)
        for value in (plan.cipher_lanes, plan.mac_lanes, plan.mac_steps):
            assert value & (value - 1) == 0
        assert 16 <= plan.mac_lanes <= launch.MAX_INTERPRETED_LANES


def test_a_device_gets_one_lane_a_thread():
    plan = launch.open_plan(1 << 20, interpreted=False)
    assert plan.cipher_lanes == plan.cipher_warps * 32
    assert plan.mac_lanes == plan.mac_warps * 32


@pytest.mark.parametrize(("num_chunks", "lanes"), [(1, 1), (2, 2), (3, 4), (32, 32), (1000, 32)])
def test_chunk_lanes_fill_a_warp_at_most(num_chunks, lanes):
    assert launch.chunk_lanes(num_chunks) == lanes


@pytest.mark.parametrize(("asked", "expected"), [("1", True), ("0", False)])
def test_the_environment_decides_whether_to_interpret(monkeypatch, asked, expected):
    monkeypatch.setenv("TRITON_INTERPRET", asked)
    assert launch.is_interpreted() is expected


def test_without_a_word_the_device_decides(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for has_device in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_device=has_device: has_device)
        assert launch.is_interpreted() is not has_device


@pytest.mark.parametrize("asked", [None, "0", "1"])
def test_a_child_decides_for_itself_whatever_was_decided_here(monkeypatch, asked):
    if asked is None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", asked)
    launch.jit(launch.load_u32.fn)
    assert os.environ.get("TRITON_INTERPRET") == asked
