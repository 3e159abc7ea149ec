"""A model under the second suite loads the same bytes as under the first, with the kernels and without."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch

from server.engine.config import EngineConfig, build_engine_argv
from server.engine.vllm import lazy
from server.engine.vllm.device_open import DeviceOpener, Mode, new_opener
from server.engine.vllm.lazy import DTYPES, SealedTensor
from server.engine.vllm.weights import SealedWeights
from server.errors import ConfigError, SealError, StartError
from server.sealed.agent import KeyAgent
from server.sealed.format import Suite
from server.sealed.shard import ShardReader
from serving_kernels import chacha20_poly1305 as kernels
from tests.unit.sealed.workshop import CHUNK_BYTES, Workshop, open_workshop

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CPU = torch.device("cpu")


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return open_workshop(tmp_path)


@contextmanager
def readers(workshop: Workshop, path: Path) -> Iterator[list[ShardReader]]:
    agent = KeyAgent(services=[workshop.kms], trusted_signers=workshop.trusted, record=lambda _tag, **_fields: None)
    release = agent.release(path)
    with release.data_key as data_key:
        opened = [ShardReader(path, shard, release.model.core, data_key.reveal()) for shard in release.model.weights]
    try:
        yield opened
    finally:
        for reader in opened:
            reader.close()


def load(workshop: Workshop, suite: Suite, mode: Mode) -> dict[str, bytes]:
    """Load as the engine's loader does: every parameter is filled by `copy_` from a sealed tensor."""
    path = workshop.seal(f"{suite}-{mode}", suite=suite)
    loaded, opener = {}, new_opener(mode)
    with readers(workshop, path) as opened:
        for reader in opened:
            for entry in reader.index.entries:
                sealed = SealedTensor(reader, entry.name, 0, entry.shape, DTYPES[entry.dtype], opener)
                parameter = torch.nn.Parameter(torch.zeros(entry.shape, dtype=sealed.dtype), requires_grad=False)
                parameter.data.copy_(sealed)
                loaded[entry.name] = parameter.data.reshape(-1).view(torch.uint8).numpy().tobytes()
    return loaded


def test_both_suites_with_and_without_the_kernel_load_the_same_bytes(workshop, monkeypatch):
    opened = []
    plain_open = kernels.open_into

    def count(*args, **kwargs):
        opened.append(kwargs["out"].numel())
        plain_open(*args, **kwargs)

    monkeypatch.setattr(kernels, "open_into", count)
    first = load(workshop, Suite.AES_256_GCM, Mode.OFF)
    assert load(workshop, Suite.CHACHA20_POLY1305, Mode.OFF) == first
    assert load(workshop, Suite.AES_256_GCM, Mode.INTERPRET) == first
    assert not opened
    assert load(workshop, Suite.CHACHA20_POLY1305, Mode.INTERPRET) == first
    checks, opened = opened[:2], opened[2:]
    assert checks[0] == checks[1]
    assert sum(opened) == sum(map(len, first.values())) > 0


def checked_opener(batch_bytes: int) -> DeviceOpener:
    """An opener that has looked at its device already, since each look takes the interpreter seconds."""
    opener = DeviceOpener(kernels, "cpu", batch_bytes=batch_bytes)
    opener._is_checked = True
    return opener


@pytest.fixture
def sealed(workshop: Workshop) -> Iterator[SealedTensor]:
    """A tensor of two whole chunks and a part, two chunks a batch."""
    path = workshop.seal(suite=Suite.CHACHA20_POLY1305)
    with readers(workshop, path) as opened:
        yield SealedTensor(opened[0], "embed", 0, (300, 256), torch.bfloat16, checked_opener(2 * CHUNK_BYTES))


@pytest.fixture
def plain(sealed: SealedTensor) -> torch.Tensor:
    return SealedTensor(sealed._reader, "embed", 0, (300, 256), torch.bfloat16).decrypt()


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16)


@pytest.mark.parametrize(
    "operation",
    [
        lambda t: t,
        lambda t: t.narrow(0, 128, 172),
        lambda t: t.narrow(0, 3, 200),
        lambda t: t[127],
        lambda t: t[:, 3:9],
        lambda t: t.t(),
    ],
    ids=["whole", "from a chunk's start", "inside chunks", "one row", "columns", "transposed"],
)
def test_any_part_opens_as_on_the_cpu(sealed, plain, operation):
    target = torch.zeros_like(operation(plain))
    target.copy_(operation(sealed))
    assert torch.equal(bits(target), bits(operation(plain)))


def test_a_misaligned_destination_is_filled_all_the_same(sealed, plain):
    memory = torch.zeros(300 * 256 + 1, dtype=torch.bfloat16)
    memory[1:].view(300, 256).copy_(sealed)
    assert torch.equal(bits(memory[1:].view(300, 256)), bits(plain))
    assert memory[0] == 0


@pytest.mark.parametrize("limit_bytes", [1 << 16, 1 << 28])
@pytest.mark.parametrize(
    "view",
    [lambda t: t, lambda t: t.narrow(1, 64, 128), lambda t: t.t()],
    ids=["another type", "columns", "transposed"],
)
def test_what_can_not_go_straight_passes_through_the_device_alone_and_is_wiped(
    sealed, plain, monkeypatch, view, limit_bytes
):
    """The host opens nothing, and asks for memory on the device only; without the wiping this fails."""
    pieces, places = [], []
    new_scratch = lazy.new_scratch
    monkeypatch.setattr(lazy, "DEVICE_SCRATCH_BYTES", limit_bytes)
    monkeypatch.setattr(ShardReader, "read_into", lambda *_: pytest.fail("opened on the host"))

    def remember(num_elements, dtype, device):
        places.append(device)
        pieces.append(new_scratch(num_elements, dtype, device))
        return pieces[-1]

    filled = []
    open_into = kernels.open_into

    def look(*args, out, **kwargs):
        open_into(*args, out=out, **kwargs)
        filled.append(bool(out.any()))
        temporaries.append(out)

    temporaries: list[torch.Tensor] = []
    monkeypatch.setattr(lazy, "new_scratch", remember)
    monkeypatch.setattr(kernels, "open_into", look)
    expected = view(plain).float()
    target = torch.empty(expected.shape)
    target.copy_(view(sealed))
    assert torch.equal(target.nan_to_num(), expected.nan_to_num())
    assert filled
    assert all(filled)
    assert set(places) == {CPU}  # which stands in for the device here
    assert max(piece.nbytes for piece in pieces) <= limit_bytes
    assert not any(held.any() for held in (*pieces, *temporaries))


def test_a_forged_chunk_under_columns_leaves_nothing(sealed, monkeypatch):
    pieces = []
    new_scratch = lazy.new_scratch
    monkeypatch.setattr(lazy, "DEVICE_SCRATCH_BYTES", 1 << 17)

    def remember(*args):
        pieces.append(new_scratch(*args))
        return pieces[-1]

    monkeypatch.setattr(lazy, "new_scratch", remember)
    tags = bytearray(sealed._reader._tags)
    tags[16 * 3] ^= 1
    sealed._reader._tags = memoryview(tags)
    target = torch.ones(300, 128, dtype=torch.bfloat16)
    with pytest.raises(SealError) as caught:
        target.copy_(sealed.narrow(1, 64, 128))
    assert "chunk 3 of " in caught.value.detail
    assert len(pieces) == 2
    assert not target.any()
    assert not any(piece.any() for piece in pieces)


def test_no_bytes_are_nothing_to_open_and_others_than_the_tensor_s_are_refused(sealed):
    open_into = sealed._opener.open_into
    open_into(sealed._reader, "embed", 64, torch.empty(0, dtype=torch.uint8))
    for offset in (-4, 300 * 256 * 2 - 4):
        with pytest.raises(ValueError, match="not inside the tensor"):
            open_into(sealed._reader, "embed", offset, torch.empty(8, dtype=torch.uint8))


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_forged_chunk_is_refused_by_number_and_leaves_nothing(workshop, chunk):
    path = workshop.seal(suite=Suite.CHACHA20_POLY1305)
    file = next(path.glob("model-00001-*.sealed"))
    with readers(workshop, path) as opened:
        pieces = opened[0].pieces("embed", chunk - 1, chunk)
        data = bytearray(file.read_bytes())
        data[pieces.file_offset + 100] ^= 1
        file.write_bytes(data)
        opener = checked_opener(2 * CHUNK_BYTES)
        target = torch.ones(300, 256, dtype=torch.bfloat16)
        with pytest.raises(SealError) as caught:
            target.copy_(SealedTensor(opened[0], "embed", 0, (300, 256), torch.bfloat16, opener))
    assert caught.value.kind == "payload"
    assert f"chunk {chunk} of " in caught.value.detail
    assert not target.any()


def test_a_cut_file_is_refused(workshop):
    path = workshop.seal(suite=Suite.CHACHA20_POLY1305)
    file = next(path.glob("model-00001-*.sealed"))
    with readers(workshop, path) as opened:
        file.write_bytes(file.read_bytes()[:70_000])
        opener = checked_opener(2 * CHUNK_BYTES)
        target = torch.ones(300, 256, dtype=torch.bfloat16)
        with pytest.raises(SealError, match="refused") as caught:
            target.copy_(SealedTensor(opened[0], "embed", 0, (300, 256), torch.bfloat16, opener))
    assert "ends inside chunk 1" in caught.value.detail
    assert not target.any()


def test_the_first_suite_stays_with_the_cpu(workshop):
    with readers(workshop, workshop.seal()) as opened:
        assert not DeviceOpener(kernels, "cpu").serves(opened[0], CPU)
        with pytest.raises(ValueError, match="for a device"):
            opened[0].pieces("embed", 0, 1)


def test_the_key_is_in_no_repr(sealed):
    pieces = sealed._reader.pieces("embed", 0, 1)
    assert pieces.key.hex() not in repr(pieces)
    assert repr(pieces.key) not in repr(pieces)


def test_without_a_device_auto_and_off_leave_it_to_the_cpu():
    assert new_opener("auto") is None or torch.cuda.is_available()
    assert new_opener("off") is None


def test_an_unknown_mode_stops_the_start():
    with pytest.raises(StartError, match="auto, interpret, off"):
        new_opener("gpu")


class WrongCipher:
    """Kernels whose tags verify and whose plaintext is wrong in one bit."""

    TagMismatchError = kernels.TagMismatchError

    def open_into(self, *args, out, **kwargs):
        kernels.open_into(*args, out=out, **kwargs)
        out[-1] ^= 1


class WrongMac:
    """Kernels that take every tag."""

    TagMismatchError = kernels.TagMismatchError

    def open_into(self, text, tags, *, out, **kwargs):
        try:
            kernels.open_into(text, tags, out=out, **kwargs)
        except kernels.TagMismatchError:
            return


@pytest.mark.parametrize("faulty", [WrongCipher(), WrongMac()])
def test_a_device_that_computes_wrongly_opens_nothing(workshop, faulty):
    with readers(workshop, workshop.seal(suite=Suite.CHACHA20_POLY1305)) as opened:
        target = torch.zeros(256, dtype=torch.bfloat16)
        with pytest.raises(StartError, match="wrong on cpu"):
            target.copy_(SealedTensor(opened[0], "norm", 0, (256,), torch.bfloat16, DeviceOpener(faulty, "cpu")))
    assert not target.any()


def test_the_loaders_take_the_mode_from_their_configuration():
    def opener(mode):
        return SealedWeights({"manifest_sha256": "0" * 64, "device_open": mode})._opener

    assert opener("off") is None
    assert isinstance(opener("interpret"), DeviceOpener)
    with pytest.raises(StartError, match="device_open is 'gpu'"):
        opener("gpu")


def test_the_engine_passes_the_mode_on(tmp_path):
    config = EngineConfig("m", tmp_path, 100, manifest_sha256="ab", device_open="off")
    argv = build_engine_argv(config, tmp_path / "e.sock")
    told = argv[argv.index("--model-loader-extra-config") + 1]
    assert told == '{"manifest_sha256":"ab","device_open":"off"}'
    with pytest.raises(ConfigError, match="device_open"):
        EngineConfig("m", tmp_path, 100, device_open="gpu")  # type: ignore[arg-type]
