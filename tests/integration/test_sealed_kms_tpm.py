"""TPM 2.0 (swtpm): release, changed PCRs, another chip, power cut."""
# apt: swtpm libtss2-dev libtss2-tcti-swtpm0

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from tpm2_pytss import ESAPI, TCTILdr
from tpm2_pytss.constants import ESYS_TR

from server.errors import ConfigError, KMSDeniedError, KMSUnreachableError, SealError
from server.sealed.kms.tpm import TPMKMS
from server.sealed.kms.uri import open_kms
from tests.integration.kms_contract import Starts, check_round_trip, require

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

PCRS = "sha256:7,14"


@dataclass
class Chip:
    """A running software TPM."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def tcti(self) -> str:
        return f"swtpm:host=127.0.0.1,port={self.port}"

    def kms(self) -> TPMKMS:
        return TPMKMS(PCRS, tcti=self.tcti)

    def extend(self, pcr: int) -> None:
        with TCTILdr("swtpm", f"host=127.0.0.1,port={self.port}") as tcti, ESAPI(tcti) as tpm:
            tpm.pcr_event(ESYS_TR(pcr), b"something else was booted")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def two_free_ports() -> int:
    """The TCTI wants the control channel one above the command channel."""
    for port in range(21000, 29000, 2):
        with contextlib.suppress(OSError), socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", port))
            b.bind(("127.0.0.1", port + 1))
            return port
    pytest.fail("no two free ports in a row")


@contextlib.contextmanager
def running_chip(state: Path) -> Generator[Chip]:
    binary = require("swtpm", "apt-get install -y swtpm libtss2-dev libtss2-tcti-swtpm0")
    port = two_free_ports()
    state.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [
            binary, "socket", "--tpm2", "--tpmstate", f"dir={state}",
            "--server", f"type=tcp,port={port},bindaddr=127.0.0.1",
            "--ctrl", f"type=tcp,port={port + 1},bindaddr=127.0.0.1",
            "--flags", "not-need-init,startup-clear",
        ]
    )  # fmt: skip
    chip = Chip(port, process)
    try:
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port + 1), 1):
                break
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield chip
    finally:
        chip.stop()


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Chip]:
    with running_chip(tmp_path / "tpm") as running:
        yield running


def test_round_trip(chip: Chip, tmp_path: Path) -> None:
    check_round_trip(chip.kms())
    starts = Starts(tmp_path, chip.kms())
    for _ in range(5):  # a handle that is not flushed shows here: the chip has three slots
        starts.released()
    starts.rewrapped_from_file_and_back()


def test_uri_and_environment(chip: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRONGROOM_TPM_TCTI", chip.tcti)
    check_round_trip(open_kms("tpm:sha256:7"))
    for uri in ("tpm:7", "tpm:sha1:7", "tpm:sha256:24", "tpm:sha256:", "tpm:sha256:7;x"):
        with pytest.raises(ConfigError, match="PCR"):
            open_kms(uri)


def test_changed_pcr(chip: Chip, tmp_path: Path) -> None:
    starts = Starts(tmp_path, chip.kms())
    chip.extend(23)  # not among the selected
    starts.released()
    chip.extend(14)
    assert "not what they were" in str(starts.refused(KMSDeniedError))


def test_another_chip(chip: Chip, tmp_path: Path) -> None:
    starts = Starts(tmp_path, chip.kms())
    with running_chip(tmp_path / "other") as other:
        foreign = other.kms()
        assert foreign.key_id != starts.kms.key_id
        with pytest.raises(SealError) as refused:
            starts.agent(foreign).release(starts.path)
        assert refused.value.kind == "key"
        foreign.key_id = starts.kms.key_id
        starts.refused(KMSDeniedError, kms=foreign)


def test_restart_with_the_same_state_still_opens(tmp_path: Path) -> None:
    with running_chip(tmp_path / "tpm") as first:
        starts = Starts(tmp_path, first.kms())
        starts.released()
    starts.refused(KMSUnreachableError)
    with running_chip(tmp_path / "tpm") as second:
        starts.released(second.kms())
