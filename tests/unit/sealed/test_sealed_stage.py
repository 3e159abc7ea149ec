"""Config and tokenizer files reach engine and gateway as they were verified, in memory only."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.errors import ConfigError, SealError, StartError
from server.registry.source import open_model
from server.sealed import stage
from server.sealed.agent import KeyAgent
from server.sealed.memory import is_memory_backed
from server.sealed.stage import (
    FILES_FD_ENV,
    OpenedFiles,
    clear_staged,
    hand_files_on,
    read_files,
    stage_files,
    staging_folder,
    take_handed_files,
    verify_staged,
)
from server.settings import ModelSettings, SealSettings
from tests.unit.sealed.test_sealed_unseal import release
from tests.unit.sealed.workshop import Workshop, open_workshop, small_source

if TYPE_CHECKING:
    from collections.abc import Iterator

SHM = Path("/dev/shm")  # noqa: S108 - files go there on purpose


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return open_workshop(tmp_path)


@pytest.fixture
def tmpfs() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir=SHM))
    yield folder
    shutil.rmtree(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("seal_files", [False, True])
def test_staged_files_are_the_verified_ones(workshop: Workshop, tmpfs: Path, seal_files: bool) -> None:
    released = release(workshop, workshop.seal(seal_files=seal_files))
    folder = staging_folder(workshop.folder, [tmpfs])
    folder.mkdir()  # what a killed start left is cleared, a file that nobody verified with it
    (folder / "adapter_config.json").write_bytes(b"{}")
    stage_files(released, folder)
    assert contents(folder) == dict(small_source().files)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o400}
    # A swap in the sealed folder comes too late for whoever reads from here.
    for path in released.model.path.glob("*.json"):
        path.write_bytes(b'{"swapped": true}')
    assert contents(folder) == dict(small_source().files)
    clear_staged(folder)
    assert not folder.exists()


def test_a_swap_between_verification_and_staging_is_refused(workshop: Workshop, tmpfs: Path) -> None:
    released = release(workshop, workshop.seal())
    (released.model.path / "config.json").write_bytes(b'{"model_type": "other"}')
    with pytest.raises(SealError, match="refused") as refused:
        stage_files(released, tmpfs / "staged")
    assert refused.value.detail.startswith("config.json")
    assert not list(tmpfs.iterdir())


@pytest.mark.parametrize("attack", ["replace", "add", "remove", "link"])
def test_a_swap_in_the_staged_folder_stops_the_load(workshop: Workshop, tmpfs: Path, attack: str) -> None:
    released = release(workshop, workshop.seal(seal_files=True))
    folder = tmpfs / "staged"
    stage_files(released, folder)
    files = read_files(released.model, released.data_key.reveal())
    verify_staged(folder, files)
    config = folder / "config.json"
    if attack == "replace":
        config.chmod(0o600)
        config.write_bytes(config.read_bytes().replace(b"tiny", b"TINY"))
    elif attack == "add":
        (folder / "adapter_config.json").write_bytes(b"{}")
    elif attack == "remove":
        config.unlink()
    else:
        (tmpfs / "same.json").write_bytes(config.read_bytes())
        config.unlink()
        config.symlink_to(tmpfs / "same.json")
    with pytest.raises(SealError) as refused:
        verify_staged(folder, files)
    assert refused.value.kind == "signature"


def test_without_a_tmpfs_nothing_is_staged(workshop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no tmpfs"):
        staging_folder(tmp_path, [tmp_path, tmp_path / "absent"])
    for seal_files in (False, True):
        released = release(workshop, workshop.seal(f"m{seal_files}", seal_files=seal_files))
        with pytest.raises(StartError, match="not a tmpfs"):
            stage_files(released, tmp_path / "staged")
        assert not (tmp_path / "staged").exists()


def test_sealed_files_are_not_staged_where_they_can_be_swapped_out(
    workshop: Workshop, tmpfs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "is_memory_backed", lambda _path: False)
    with pytest.raises(StartError, match="swapoff"):
        stage_files(release(workshop, workshop.seal(seal_files=True)), tmpfs / "sealed")
    assert not list(tmpfs.iterdir())
    stage_files(release(workshop, workshop.seal("plain")), tmpfs / "plain")  # these lie on a disk anyway


def test_a_folder_that_somebody_else_made_is_refused(workshop: Workshop, tmpfs: Path) -> None:
    target = tmpfs / "theirs"
    target.mkdir()
    folder = tmpfs / "staged"
    folder.symlink_to(target)
    with pytest.raises(StartError, match="not a folder of this user"):
        stage_files(release(workshop, workshop.seal()), folder)
    assert not list(target.iterdir())


def test_two_engines_never_share_a_folder(tmp_path: Path) -> None:
    owners = [tmp_path / state / "models" / model for state in "ab" for model in ("m", "m2")]
    assert len({staging_folder(owner) for owner in owners}) == 4
    assert staging_folder(owners[0]) == staging_folder(owners[0])


@pytest.mark.parametrize(
    ("kind", "options", "swap", "expected"),
    [
        ("tmpfs", "rw", "", True),
        ("tmpfs", "rw", "/dev/sda2 partition 1 0 -2\n", False),
        ("tmpfs", "rw,noswap", "/dev/sda2 partition 1 0 -2\n", True),
        ("ramfs", "rw", "/dev/sda2 partition 1 0 -2\n", True),
        ("ext4", "rw", "", False),
    ],
)
def test_what_counts_as_memory(tmp_path: Path, kind: str, options: str, swap: str, expected: bool) -> None:
    device = tmp_path.stat().st_dev
    mounts, swaps = tmp_path / "mounts", tmp_path / "swaps"
    mounts.write_text(f"1 2 {os.major(device)}:{os.minor(device)} / {tmp_path} rw shared:1 - {kind} none {options}\n")
    swaps.write_text(f"Filename Type Size Used Priority\n{swap}")
    assert is_memory_backed(tmp_path, swaps=swaps, mounts=mounts) is expected


def handed(fd: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, OpenedFiles]:
    monkeypatch.setenv(FILES_FD_ENV, str(os.dup(fd)))
    return take_handed_files()


def test_the_gateway_gets_the_files_in_a_file_that_nobody_can_write(monkeypatch: pytest.MonkeyPatch) -> None:
    assert take_handed_files() == {}
    opened = {"m": OpenedFiles("ab" * 32, {"config.json": b"{}", "tokenizer.json": bytes(range(256))})}
    fd = hand_files_on(opened)
    for _ in range(2):  # a gateway that is started again reads the same
        assert handed(fd, monkeypatch) == opened
    assert FILES_FD_ENV not in os.environ
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"x", 0)
    os.close(fd)
    with tempfile.TemporaryFile(dir=SHM) as writable:
        monkeypatch.setenv(FILES_FD_ENV, str(os.dup(writable.fileno())))
        with pytest.raises(StartError):
            take_handed_files()
    monkeypatch.setenv(FILES_FD_ENV, "none")
    with pytest.raises(StartError):
        take_handed_files()


def test_a_model_with_sealed_files_is_read_from_what_was_handed_on(workshop: Workshop) -> None:
    source = small_source()
    files = {**source.files, "config.json": json.dumps({"max_position_embeddings": 64}).encode()}
    path = workshop.seal(source=type(source)(source.shards, files), seal_files=True)
    pub = workshop.folder / "signer.pub"
    pub.write_bytes(workshop.signer.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    model, seal = ModelSettings(id="tiny", path=path), SealSettings(trusted_signers=(pub,))
    with pytest.raises(ConfigError, match="strongroom serve"):
        open_model(model, seal, floor=1)
    events: list[str] = []
    agent = KeyAgent(
        services=[workshop.kms], trusted_signers=workshop.trusted, record=lambda tag, **_fields: events.append(tag)
    )
    opened = agent.open_files(path)
    assert events == ["weights:key:requested", "weights:key:released"]
    found = open_model(model, seal, floor=1, opened=opened)
    assert found.max_model_len == 64
    assert found.files == {"tokenizer.json": files["tokenizer.json"]}
    with pytest.raises(ConfigError, match="replaced"):
        open_model(model, seal, floor=1, opened=OpenedFiles("00" * 32, opened.files))
