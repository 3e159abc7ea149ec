"""`strongroom bench engine-pairs` on a real gateway and an instant engine: both arms ask the same."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import pytest
from typing_extensions import override

from benchmarks.gateway.kit import MODEL, GatewayKit
from benchmarks.serving import engine_pairs
from benchmarks.serving.client import Client, Target
from benchmarks.serving.served import Served
from server.engine.local import engine_paths


@dataclass
class Standing(Served):
    """A server that runs already, as `Served` shows one."""

    kit: GatewayKit | None = None
    key: str = ""
    admin_key: str = ""

    @property
    @override
    def client(self):
        assert self.kit is not None
        return {"OPENAI_BASE_URL": f"{self.kit.base}/v1", "OPENAI_API_KEY": self.key, "MODEL": MODEL}

    @property
    @override
    def admin(self):
        assert self.kit is not None
        return {"ADMIN_BASE_URL": self.kit.admin, "ADMIN_API_KEY": self.admin_key}

    @property
    @override
    def engine_url(self):
        assert self.kit is not None
        return f"unix://{engine_paths(self.kit.settings.state, MODEL).socket}"


@pytest.fixture
def standing(gateway, key, admin_key, tmp_path):
    gateway.control(num_tokens=12, delay_ms=2)
    yield Standing(tmp_path, kit=gateway, key=key, admin_key=admin_key)
    gateway.control()


async def test_pairs_are_the_same_requests_for_both_arms(standing, gateway):
    rows = await engine_pairs.run_pairs(standing, 1, 3, chats=2, max_tokens=8)
    assert [row["pair"] for row in rows] == [1, 2, 3]
    assert all(row["through_tokens"] == row["bare_tokens"] for row in rows)
    assert all(row["through_tokens_per_s"] > 0 and row["bare_ttft_ms"] > 0 for row in rows)
    found = {(m.name, m.statistic): m for m in engine_pairs.measures(rows)}
    ratios = [row["through_tokens_per_s"] / row["bare_tokens_per_s"] for row in rows]
    assert found["throughput_ratio", "mean"].value == pytest.approx(statistics.fmean(ratios))
    low, high = found["throughput_ratio", "mean"].interval or (0.0, 0.0)
    # A resampled mean of three equal draws may differ from the draw in its last bit.
    assert min(ratios) * (1 - 1e-9) <= low <= high <= max(ratios) * (1 + 1e-9)


async def test_engine_gets_the_very_ids_that_were_rendered(standing, gateway):
    texts = engine_pairs.questions(1, 1)
    (through,), (bare,), (length,) = engine_pairs.bodies(standing, texts, 8)
    sent = []
    for url, key, body in (
        (standing.client["OPENAI_BASE_URL"], standing.key, through),
        (standing.engine_url, "", bare),
    ):
        client = Client(Target.parse(url, key=key), timeout_s=30)
        await client.ask(engine_pairs.ROUTE, body, stream=True)
        client.close()
        sent.append(gateway.stats()["last_body"]["kv_transfer_params"]["prompt_token_ids"])
    assert sent[0] == sent[1]
    assert len(sent[0]) == length


def test_questions_are_never_asked_twice():
    asked = [text for pair in range(40) for text in engine_pairs.questions(pair, 8)]
    assert len(set(asked)) == len(asked)
