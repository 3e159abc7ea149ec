"""Kill -9 at random points under load: no answer a client received lacks its records; the log verifies after each."""

from __future__ import annotations

import asyncio
import json
import random
import signal
from typing import TYPE_CHECKING

import pytest

from server.audit.checkpoint import new_audit_key
from server.audit.client import AuditClient
from server.audit.entry import new_entry
from server.audit.tags import Event
from server.audit.tail import entries_from
from server.audit.verify import Verifier
from server.errors import AuditUnavailableError
from tests.unit.audit.audit_kit import ORIGIN, read_vkey, start_writer

if TYPE_CHECKING:
    from pathlib import Path

CLIENTS = 12
ROUNDS_A_LOG = 10


async def load(client: AuditClient, prefix: str, answered: dict[str, tuple[int, int]]) -> None:
    """Be a gateway's request after the other until the log goes away; remember which clients got their whole answer."""
    number = 0
    while True:
        request_id = f"{prefix}-{number}"
        number += 1
        try:
            first = await client.append(new_entry(Event.REQUEST_ACCEPTED, request_id=request_id))
            last = await client.append(new_entry(Event.REQUEST_FINISHED, request_id=request_id, outcome="completed"))
        except AuditUnavailableError:
            return
        answered[request_id] = (first, last)


async def one_kill(state: Path, number: int, rng: random.Random, answered: dict[str, tuple[int, int]]) -> None:
    process = await asyncio.to_thread(
        start_writer, state, state / "audit.key", "--segment-bytes", "200000", "--publish-interval-s", "0.02"
    )
    if answered:  # before that, there may be no checkpoint yet
        await asyncio.to_thread(check, state, answered)  # the writer has recovered what the kill before left
    client = AuditClient(state / "audit.sock")
    tasks = [asyncio.create_task(load(client, f"r{number}-{at}", answered)) for at in range(CLIENTS)]
    await asyncio.sleep(rng.uniform(0.0, 0.12))
    process.send_signal(signal.SIGKILL)
    await asyncio.gather(*tasks)
    await asyncio.to_thread(process.wait)
    await client.aclose()


def check(state: Path, answered: dict[str, tuple[int, int]]) -> None:
    report = Verifier(state / "audit", key=read_vkey(state)).verify()
    assert report.num_open == 0
    assert report.num_accepted == report.num_finished
    found: dict[str, list[tuple[int, str]]] = {}
    for index, data in entries_from(state / "audit", 0):
        entry = json.loads(data)
        if "request_id" in entry:
            found.setdefault(entry["request_id"], []).append((index, entry.get("outcome", "accepted")))
    for request_id, (first, last) in answered.items():
        assert found[request_id] == [(first, "accepted"), (last, "completed")]


async def campaign(folder: Path, rounds: int, seed: int) -> int:
    rng = random.Random(seed)  # noqa: S311 - a seeded campaign
    total = 0
    for start in range(0, rounds, ROUNDS_A_LOG):
        state = folder / str(start)
        state.mkdir()
        new_audit_key(state / "audit.key", name=ORIGIN)
        answered: dict[str, tuple[int, int]] = {}
        for number in range(min(ROUNDS_A_LOG, rounds - start)):
            await one_kill(state, number, rng, answered)
        process = await asyncio.to_thread(start_writer, state, state / "audit.key")
        process.terminate()
        assert await asyncio.to_thread(process.wait, 20) == 0
        await asyncio.to_thread(check, state, answered)
        total += len(answered)
    return total


async def test_fifty_kills_lose_no_answered_request(tmp_path: Path) -> None:
    assert await campaign(tmp_path, 50, seed=9) > 500


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_a_thousand_kills_lose_no_answered_request(tmp_path: Path) -> None:
    assert await campaign(tmp_path, 1_000, seed=1_000) > 10_000
