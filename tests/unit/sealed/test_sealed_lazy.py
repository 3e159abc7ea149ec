"""A sealed tensor behaves as the plain one would, and decrypts straight into what it is copied to."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy
import pytest
import torch

from server.engine.vllm import lazy
from server.engine.vllm.lazy import SealedTensor, storages
from server.errors import SealError
from server.sealed.agent import KeyAgent
from server.sealed.shard import ShardReader
from server.sealed.source import MemoryShard, prepare
from tests.unit.sealed.workshop import CHUNK_BYTES, Workshop, open_workshop, plaintext, small_source, tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@contextmanager
def opened(workshop: Workshop, path: Path) -> Iterator[ShardReader]:
    agent = KeyAgent(services=[workshop.kms], trusted_signers=workshop.trusted, record=lambda _tag, **_fields: None)
    release = agent.release(path)
    with ShardReader(path, release.model.weights[0], release.model.core, release.data_key.reveal()) as reader:
        yield reader


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[ShardReader]:
    workshop = open_workshop(tmp_path)
    with opened(workshop, workshop.seal()) as reader:
        yield reader


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


@pytest.fixture
def wiped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every memory that was wiped, in order; it must have held something before, and nothing afterwards."""
    sizes: list[int] = []
    wipe = lazy._WipedMemory.__del__

    def watched(memory: Any) -> None:
        data = memory.view(numpy.ndarray)  # what a subclass computes is one as well, and would come here
        held = data.any()
        wipe(memory)
        sizes.append(data.nbytes if held and not data.any() else -1)

    monkeypatch.setattr(lazy._WipedMemory, "__del__", watched)
    return sizes


def test_what_was_opened_for_one_operation_is_wiped(
    sealed: SealedTensor, plain: torch.Tensor, wiped: list[int]
) -> None:
    size = plain.numel() * 2
    assert torch.equal(bits(sealed * 1), bits(plain * 1))
    assert wiped == [size]
    torch.zeros(300, 256, dtype=torch.bfloat16).copy_(torch.abs(sealed))
    assert wiped == [size] * 2
    torch.zeros(2, 300, 256).copy_(sealed)
    assert wiped == [size] * 3


def test_plaintext_that_is_kept_is_wiped_after_its_last_use(
    sealed: SealedTensor, plain: torch.Tensor, wiped: list[int]
) -> None:
    """Loaders list tensors, keep views of them, or make them a parameter's own memory: none may lose its values."""
    kept = [sealed.decrypt(), sealed.expand(1, 300, 256), sealed.decrypt()[7:9].view(torch.int16)]
    parameter = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False)
    parameter.data = sealed.decrypt()
    assert wiped == []
    assert torch.equal(bits(kept[0]), bits(plain))
    assert torch.equal(bits(kept[1])[0], bits(plain))
    assert torch.equal(kept[2], plain[7:9].view(torch.int16))
    assert torch.equal(bits(parameter), bits(plain))
    kept.clear()
    assert len(wiped) == 3
    del parameter
    assert wiped == [plain.numel() * 2] * 4


def test_an_empty_tensor_opens_to_an_empty_one(reader: ShardReader) -> None:
    opened = SealedTensor(reader, "embed", 0, (0, 4), torch.bfloat16).decrypt()
    assert opened.shape == (0, 4)
    assert opened.dtype == torch.bfloat16


class Scratch:
    """Every piece of memory that plaintext passed through, with whether it held any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pieces: list[torch.Tensor] = []
        self.num_filled = 0
        new_scratch, fill = lazy.new_scratch, SealedTensor._open

        def remember(*args: Any) -> torch.Tensor:
            self.pieces.append(new_scratch(*args))
            return self.pieces[-1]

        def count(tensor: SealedTensor, destination: torch.Tensor, layout: torch.Tensor) -> None:
            fill(tensor, destination, layout)
            is_scratch = bool(self.pieces) and destination.data_ptr() == self.pieces[-1].data_ptr()
            self.num_filled += is_scratch and bool(destination.any())

        monkeypatch.setattr(lazy, "new_scratch", remember)
        monkeypatch.setattr(SealedTensor, "_open", count)

    @property
    def largest_bytes(self) -> int:
        sizes: list[int] = [piece.nbytes for piece in self.pieces]
        return max(sizes)

    @property
    def is_wiped(self) -> bool:
        return self.num_filled == len(self.pieces) > 0 and not any(piece.any() for piece in self.pieces)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "columns": lambda t: t.narrow(1, 64, 128),
    "the last columns": lambda t: t[:, 250:],
    "one column": lambda t: t[:, 7],
    "columns of a slice": lambda t: t.narrow(0, 120, 90).narrow(1, 3, 20),
    "transposed": lambda t: t.t(),
    "rows of the transposed": lambda t: t.t().narrow(0, 30, 100),
    "a part of a part": lambda t: t.view(30, 10, 256).narrow(1, 2, 5),
    "the middle of three": lambda t: t.view(10, 30, 256)[:, 3:4, 5:9].permute(2, 0, 1),
    "every third row": lambda t: t[1::3],
    "half of a split": lambda t: t.split(128, dim=1)[1],
    "a chunk": lambda t: t.chunk(3, dim=1)[2],
    "unsqueezed": lambda t: t[:, 2:8].unsqueeze(1),
    "nothing": lambda t: t[:, 5:5],
}


@pytest.mark.parametrize("limit_bytes", [1 << 12, 1 << 16, 1 << 23])
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_stays_sealed_and_opens_through_bounded_memory_that_is_wiped(
    sealed: SealedTensor, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch, view, limit_bytes: int
) -> None:
    monkeypatch.setattr(lazy, "HOST_SCRATCH_BYTES", limit_bytes)
    monkeypatch.setattr(SealedTensor, "decrypt", lambda *_: pytest.fail("materialised"))
    scratch = Scratch(monkeypatch)
    part = view(sealed)
    assert isinstance(part, SealedTensor)
    expected = view(plain)
    for dtype in (torch.bfloat16, torch.float32):
        target = torch.zeros(expected.shape, dtype=dtype)
        target.copy_(part)
        assert torch.equal(target.nan_to_num(), expected.to(dtype).nan_to_num())
    if part.numel():
        assert scratch.is_wiped
        assert scratch.largest_bytes <= limit_bytes


def test_columns_go_into_columns_of_a_fused_parameter(sealed: SealedTensor, plain: torch.Tensor) -> None:
    fused = torch.zeros(300, 512, dtype=torch.bfloat16)
    fused[:, 100:228].copy_(sealed.narrow(1, 128, 128))
    assert torch.equal(bits(fused[:, 100:228]), bits(plain[:, 128:]))
    assert not fused[:, :100].any()
    assert not fused[:, 228:].any()


def test_chunks_that_a_slice_does_not_touch_stay_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than three chunks each: of columns, one chunk a row is opened; of experts, their rows only."""
    workshop = open_workshop(tmp_path)
    row = CHUNK_BYTES // 2
    names = {"wide": (4, 3 * row + 100), "experts": (4, 8, row)}
    wide = prepare([MemoryShard([tensor(name, shape) for name, shape in names.items()])], small_source().files)
    with opened(workshop, workshop.seal(source=wide)) as reader:
        chunks: list[int] = []
        open_chunk = ShardReader._open_chunk

        def count(reader: ShardReader, chunk: int, file_offset: int, destination: memoryview) -> None:
            chunks.append(chunk)
            open_chunk(reader, chunk, file_offset, destination)

        monkeypatch.setattr(ShardReader, "_open_chunk", count)
        for name, view, num_chunks in (
            ("wide", lambda t: t[:, row + 5 : row + 25], 4),
            ("experts", lambda t: t.narrow(1, 2, 3), 12),
        ):
            whole = torch.frombuffer(bytearray(plaintext(wide)[name]), dtype=torch.bfloat16).reshape(names[name])
            chunks.clear()
            target = torch.zeros_like(view(whole))
            target.copy_(view(SealedTensor(reader, name, 0, names[name], torch.bfloat16)))
            assert torch.equal(bits(target), bits(view(whole)))
            assert len(chunks) == num_chunks


def test_a_forged_chunk_under_a_slice_leaves_nothing_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cipher writes before it knows that the tag is wrong: destination, scratch and half chunks are zeroed."""
    workshop = open_workshop(tmp_path)
    path = workshop.seal()
    monkeypatch.setattr(lazy, "HOST_SCRATCH_BYTES", 40_000)
    scratch = Scratch(monkeypatch)
    halves: list[memoryview] = []
    open_chunk = ShardReader._open_chunk

    def remember(reader: ShardReader, chunk: int, file_offset: int, destination: memoryview) -> None:
        halves.append(destination)
        open_chunk(reader, chunk, file_offset, destination)

    with opened(workshop, path) as reader:
        monkeypatch.setattr(ShardReader, "_open_chunk", remember)
        tags = bytearray(reader._tags)
        tags[16 * 2] ^= 1  # of the second chunk of the first tensor
        reader._tags = memoryview(tags)
        target = torch.ones(300, 100, dtype=torch.bfloat16)
        with pytest.raises(SealError) as caught:
            target.copy_(SealedTensor(reader, "embed", 0, (300, 256), torch.bfloat16)[:, :100])
    assert "chunk 2 of " in caught.value.detail
    assert not target.any()
    assert len(scratch.pieces) > 1
    assert not any(piece.any() for piece in scratch.pieces)
    assert len(halves) > 1
    assert not any(any(half) for half in halves)


def test_a_conversion_goes_straight_to_its_result(
    sealed: SealedTensor, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = Scratch(monkeypatch)
    assert torch.equal(sealed.float().nan_to_num(), plain.float().nan_to_num())
    assert scratch.is_wiped


def test_repr_holds_no_weights(sealed: SealedTensor) -> None:
    assert repr(sealed) == "SealedTensor(shape=(300, 256), dtype=torch.bfloat16)"


def test_memory_behind_parameters_is_told_once_and_in_their_order() -> None:
    first, second = torch.empty(10), torch.empty(4, 4)
    parts = [first, second[:2], second[2:], torch.empty(3, device="meta")]
    assert storages(parts) == [(first.data_ptr(), 40), (second.data_ptr(), 64)]
