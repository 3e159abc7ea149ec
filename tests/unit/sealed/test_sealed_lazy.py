"""A sealed tensor behaves as the plain one would, and decrypts straight into what it is copied to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from server.engine.vllm.lazy import SealedTensor
from server.sealed.agent import KeyAgent
from server.sealed.shard import ShardReader
from tests.unit.sealed.workshop import open_workshop, plaintext, small_source

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[ShardReader]:
    workshop = open_workshop(tmp_path)
    path = workshop.seal()
    agent = KeyAgent(services=[workshop.kms], trusted_signers=workshop.trusted, record=lambda _tag, **_fields: None)
    release = agent.release(path)
    with ShardReader(path, release.model.weights[0], release.model.core, release.data_key.reveal()) as opened:
        yield opened


@pytest.fixture
def sealed(reader: ShardReader) -> SealedTensor:
    return SealedTensor(reader, "embed", 0, (300, 256), torch.bfloat16)


@pytest.fixture
def plain() -> torch.Tensor:
    data = bytearray(plaintext(small_source())["embed"])
    return torch.frombuffer(data, dtype=torch.bfloat16).reshape(300, 256)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


def test_copy_decrypts_in_place_without_a_second_tensor(
    sealed: SealedTensor, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SealedTensor, "decrypt", lambda _: pytest.fail("materialised"))
    fused = torch.zeros(2, 300, 256, dtype=torch.bfloat16)
    fused[1].copy_(sealed.view(300, 256).narrow(0, 0, 300)[:])
    assert torch.equal(bits(fused[1]), bits(plain))
    assert not fused[0].any()
    rows = torch.zeros(100, 256, dtype=torch.bfloat16)
    rows.data.copy_(sealed.narrow(0, 150, 100))
    assert torch.equal(bits(rows), bits(plain[150:250]))
    row = torch.zeros(256, dtype=torch.bfloat16)
    row.copy_(sealed[-1])
    assert torch.equal(bits(row), bits(plain[-1]))


@pytest.mark.parametrize(
    "operation",
    [
        lambda t: t.t(),
        lambda t: t[:, 3:9],
        lambda t: t[::2],
        lambda t: t.chunk(3, dim=1)[1],
        lambda t: t.split(100)[2],
        lambda t: t.reshape(-1, 2),
        lambda t: torch.cat([t, t]),
        lambda t: t.unsqueeze(0).clone(),
        lambda t: t.to(torch.float32).to(torch.bfloat16),
        lambda t: t.index_select(0, torch.tensor([4, 2])),
    ],
)
def test_every_other_operation_gives_what_the_plain_one_gives(
    sealed: SealedTensor, plain: torch.Tensor, operation
) -> None:
    expected = operation(plain)
    result = operation(sealed)
    target = torch.zeros_like(expected)
    target.copy_(result)
    assert torch.equal(bits(target), bits(expected))


def test_copy_into_another_dtype_or_layout(sealed: SealedTensor, plain: torch.Tensor) -> None:
    single = torch.zeros(300, 256)
    single.copy_(sealed)
    assert torch.equal(single.nan_to_num(), plain.float().nan_to_num())
    across = torch.zeros(256, 300, dtype=torch.bfloat16).t()
    across.copy_(sealed)
    assert torch.equal(bits(across), bits(plain))


def test_repr_holds_no_weights(sealed: SealedTensor) -> None:
    assert repr(sealed) == "SealedTensor(shape=(300, 256), dtype=torch.bfloat16)"
