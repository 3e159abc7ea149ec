"""What every key service must show in front of a real server; each backend's test calls this and adds its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.errors import KMSDeniedError, KMSError
from server.sealed.agent import KeyAgent
from server.sealed.format import Recipient
from server.sealed.kms.base import KMS, DataKey, KeyContext
from server.sealed.rewrap import rewrap
from tests.unit.sealed.workshop import Workshop, open_workshop

KEY = bytes(range(32))
CONTEXT = KeyContext("coder", 3, "0" * 32)


def require(command: str, how: str) -> str:
    """Return the path of a server's command; a machine without it fails the test with what to type."""
    path = shutil.which(command) or shutil.which(command, path="/usr/sbin:/usr/local/sbin")
    if path is None:
        pytest.fail(f"{command} is missing; install it: {how}")
    return path


def check_round_trip(kms: KMS) -> Recipient:
    """Wrap, unwrap, and refuse every other context and every damage."""
    recipient = kms.wrap(DataKey(KEY), CONTEXT)
    assert recipient.kms == kms.mechanism
    assert KEY not in recipient.wrapped
    assert bytes(kms.unwrap(recipient, CONTEXT).reveal()) == KEY
    for other in (
        KeyContext("other", 3, "0" * 32),
        KeyContext("coder", 2, "0" * 32),
        KeyContext("coder", 3, "1" * 32),
        KeyContext("coder", 3, "0" * 32, "files"),
    ):
        with pytest.raises(KMSDeniedError, match="does not open"):
            kms.unwrap(recipient, other)
    for position in (0, len(recipient.wrapped) // 2, -1):
        damaged = bytearray(recipient.wrapped)
        damaged[position] ^= 1
        with pytest.raises(KMSError):
            kms.unwrap(Recipient(kms.mechanism, kms.key_id, bytes(damaged)), CONTEXT)
    for cut in (b"", recipient.wrapped[:8], recipient.wrapped[:-1]):
        with pytest.raises(KMSError):
            kms.unwrap(Recipient(kms.mechanism, kms.key_id, cut), CONTEXT)
    return recipient


class Starts:
    """A sealed model under one key service, and whether an engine would get its key."""

    def __init__(self, folder: Path, kms: KMS) -> None:
        self.workshop: Workshop = open_workshop(folder)
        self.kms = kms
        self.path = self.workshop.seal(services=[kms])
        self.events: list[tuple[str, dict[str, Any]]] = []

    def agent(self, kms: KMS | None = None) -> KeyAgent:
        return KeyAgent(
            services=[kms or self.kms],
            trusted_signers=self.workshop.trusted,
            record=lambda tag, **fields: self.events.append((tag, fields)),
        )

    def released(self, kms: KMS | None = None) -> None:
        self.events.clear()
        with self.agent(kms).release(self.path).data_key as data_key:
            assert bytes(data_key.reveal()) != bytes(32)
        assert [tag for tag, _ in self.events] == ["weights:key:requested", "weights:key:released"]

    def refused(self, error: type[KMSError], *, kms: KMS | None = None) -> KMSError:
        """No key, the reason told apart, and both the intent and the refusal on record."""
        self.events.clear()
        with pytest.raises(error) as refusal:
            self.agent(kms).release(self.path)
        assert type(refusal.value) is error
        assert [tag for tag, _ in self.events] == ["weights:key:requested", "weights:key:refused"]
        assert self.events[-1][1]["code"] == error.code
        return refusal.value

    def rewrapped_from_file_and_back(self) -> None:
        """A model sealed for a local key is handed to this service and back; payload and signature stay as they are."""
        model_path = self.workshop.seal("rotated")
        before = {p.name: p.read_bytes() for p in model_path.iterdir()}
        trusted = self.workshop.trusted
        from server.sealed.model import open_sealed

        for source, target in ((self.workshop.kms, self.kms), (self.kms, self.workshop.kms)):
            opened = open_sealed(model_path, trusted_signers=trusted)
            (recipient,) = rewrap(opened, services=[source], to=[target])
            assert (recipient.kms, recipient.key_id) == (target.mechanism, target.key_id)
        after = {p.name: p.read_bytes() for p in model_path.iterdir()}
        assert {n for n in before if before[n] != after[n]} == {"recipients.json"}


def no_sleep() -> tuple[list[float], Callable[[float], None]]:
    """Return a list of what was slept and a sleep that only notes it."""
    slept: list[float] = []
    return slept, slept.append
