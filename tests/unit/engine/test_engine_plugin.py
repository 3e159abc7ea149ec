"""The plug-in hands the key socket on to the processes that open weights, and bears those that were given none."""

import os
from multiprocessing import util

import pytest

from server.engine.vllm.plugin import pass_key_socket_on


@pytest.fixture(autouse=True)
def original(monkeypatch):
    kept = util.spawnv_passfds
    monkeypatch.setattr(util, "spawnv_passfds", kept)
    return kept


def test_a_process_without_the_socket_is_left_alone(original):
    """vLLM inspects a model's class in a process of its own, where the variable names a descriptor it has not."""
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    pass_key_socket_on(reader)
    assert vars(util)["spawnv_passfds"] is original


def test_a_process_with_the_socket_hands_it_on_to_spawned_children_only(monkeypatch):
    calls: list[list[int]] = []

    def spawn_passfds(_path, _args, fds):
        calls.append(list(fds))
        return 1

    monkeypatch.setattr(util, "spawnv_passfds", spawn_passfds)
    reader, writer = os.pipe()
    try:
        pass_key_socket_on(reader)
        assert not os.get_inheritable(reader)
        spawn = vars(util)["spawnv_passfds"]
        spawn(b"python", [b"-c", b"from multiprocessing.resource_tracker import main"], [7])
        spawn(
            b"python",
            [b"-c", b"from multiprocessing.spawn import spawn_main; spawn_main()", b"--multiprocessing-fork"],
            [7],
        )
        assert calls == [[7], [7, reader]]
    finally:
        os.close(reader)
        os.close(writer)
