"""Unsealing gives the source back byte for byte, onto a tmpfs only, or nothing at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors import safe_open

from server.errors import ConfigError, SealError
from server.sealed.agent import KeyAgent, Release
from server.sealed.format import HEADER_BYTES, parse_header
from server.sealed.source import load_source
from server.sealed.unseal import check_target, unseal
from tests.unit.sealed.workshop import Workshop, open_workshop, plaintext, small_source

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return open_workshop(tmp_path)


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    import tempfile

    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


def release(workshop: Workshop, path: Path) -> Release:
    agent = KeyAgent(services=[workshop.kms], trusted_signers=workshop.trusted, record=lambda _tag, **_fields: None)
    return agent.release(path)


@pytest.mark.parametrize("seal_files", [False, True])
def test_the_source_comes_back(workshop: Workshop, tmpfs: Path, seal_files: bool) -> None:
    released = release(workshop, workshop.seal(seal_files=seal_files))
    out = tmpfs / "plain"
    check_target(out, force=False)
    unseal(released.model, released.data_key.reveal(), out)
    again = load_source(out)
    assert plaintext(again) == plaintext(small_source())
    assert again.files == small_source().files
    assert {p.stat().st_mode & 0o777 for p in out.iterdir()} == {0o600}
    with safe_open(out / "model-00001-of-00002.safetensors", "np") as file:
        assert sorted(file.keys()) == ["embed", "exact", "norm"]


def test_a_disk_is_refused_unless_forced(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on a disk"):
        check_target(tmp_path / "plain", force=False)
    check_target(tmp_path / "plain", force=True)
    with pytest.raises(ConfigError, match="new folder"):
        check_target(tmp_path, force=True)
    with pytest.raises(ConfigError, match="new folder"):
        check_target(tmp_path / "a" / "b", force=True)


def test_a_bad_chunk_leaves_nothing(workshop: Workshop, tmpfs: Path) -> None:
    path = workshop.seal()
    name = "model-00002-of-00002.sealed"
    data = bytearray((path / name).read_bytes())
    data[parse_header(bytes(data[:HEADER_BYTES]), name).tags_offset - 1] ^= 1
    (path / name).write_bytes(data)
    released = release(workshop, path)
    with pytest.raises(SealError) as refused:
        unseal(released.model, released.data_key.reveal(), tmpfs / "plain")
    assert refused.value.detail.startswith(f"{name}: chunk ")
    assert not list(tmpfs.iterdir())
