"""`bench flood` over a whole gateway: keys of two tenants, questions nobody asked before, both phases measured."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gateway.kit import MODEL
from benchmarks.serving import flood
from benchmarks.serving.served import NotServedError


def test_both_phases_are_measured_and_the_flood_is_served(gateway):
    client = {"MODEL": MODEL, "OPENAI_BASE_URL": gateway.base + "/v1"}
    served: Any = SimpleNamespace(state=gateway.state, client=client)
    keys = [flood.new_key(served, tenant) for tenant in ("calm", "loud")]
    for key in keys:
        gateway.wait_for_key(key)
    idle, flooded, loud = asyncio.run(flood.measure(served, keys, connections=5, asks=3, max_tokens=4))
    assert len(idle) == len(flooded) == 3
    assert min(idle + flooded) > 0
    assert loud.num_answered > 0
    assert loud.num_refused == 0
    asked = [entry for entry in gateway.entries() if entry.get("principal", {}).get("tenant") == "loud"]
    assert asked


def test_no_key_is_one_clear_line(tmp_path):
    with pytest.raises(NotServedError, match="no key was made"):
        flood.new_key(SimpleNamespace(state=tmp_path), "calm")  # type: ignore[arg-type]


def test_questions_are_all_different():
    assert len({flood.question("m", number, 8) for number in range(500)}) == 500
