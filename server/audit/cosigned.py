"""Has a log's checkpoints cosigned by its witnesses, keeps what they answer, and tells when one refuses or is lost."""

from __future__ import annotations

import base64
import os
import ssl
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from http.client import HTTPException
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from server.audit.checkpoint import NoteError, VerifierKey, split_note, verify_checkpoint, verify_note
from server.audit.log import sync_folder
from server.audit.tiles import TileError, TileReader
from server.audit.witness import MAX_REQUEST_BYTES
from server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_TIMEOUT_S = 10.0


class WitnessError(Exception):
    """The witness refused, or answered with something that is no cosignature."""


class WitnessState(StrEnum):
    """How a witness stands to the log."""

    COSIGNS = "cosigns"
    REFUSES = "refuses"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class WitnessAddress:
    """A witness as the log knows it.

    Attributes:
        url: Its submission prefix.
        key: Its public key.
        ca: PEM file of the authority that vouches for an https address; None for the system's.
    """

    url: str
    key: VerifierKey
    ca: Path | None = None

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError("A witness's address begins with http:// or https://.")


class Cosigner:
    """Takes one published checkpoint a round to all witnesses and keeps their cosignatures on it together.

    Args:
        directory: The log.
        witnesses: Who is asked.
        on_state: Told (witness, state, entries or why) when a witness first answers, and when its state changes.
    """

    def __init__(
        self,
        directory: Path,
        witnesses: tuple[WitnessAddress, ...],
        *,
        on_state: Callable[[WitnessAddress, WitnessState, str], None] = lambda _witness, _state, _detail: None,
    ) -> None:
        self._directory = directory
        self._witnesses = witnesses
        self._on_state = on_state
        self._states: dict[str, WitnessState] = {}
        self._sizes: dict[str, int] = {}

    def round(self) -> tuple[int, dict[str, Exception]]:
        """Ask every witness once.

        Returns:
            The size of the checkpoint, and for each witness that did not cosign it, by name, why.

        Raises:
            OSError: The log can't be read, or the cosignatures can't be kept.
            NoteError: The log's key or checkpoint is malformed.
        """
        log_key = VerifierKey.parse((self._directory / "vkey").read_text())
        note = (self._directory / "checkpoint").read_text()
        size = verify_checkpoint(note, log_key).size
        lines: list[str] = []
        failures: dict[str, Exception] = {}
        changes: list[tuple[WitnessAddress, WitnessState, str]] = []
        for witness in self._witnesses:
            try:
                lines += self._ask(witness, note, size)
                state, detail = WitnessState.COSIGNS, str(size)
            except WitnessError as err:
                state, detail, failures[witness.key.name] = WitnessState.REFUSES, str(err), err
            except (OSError, HTTPException, TileError) as err:
                state, detail, failures[witness.key.name] = WitnessState.LOST, type(err).__name__, err
            if self._states.get(witness.key.name) is not state:
                self._states[witness.key.name] = state
                changes.append((witness, state, detail))
        if lines:
            self._keep(note, lines)
        for change in changes:  # last: putting one on record makes a checkpoint of its own
            self._on_state(*change)
        return size, failures

    def _ask(self, witness: WitnessAddress, note: str, size: int) -> list[str]:
        """Return the witness's signature lines over the checkpoint; the first old size is the one it named last."""
        old_size = self._sizes.get(witness.key.name, 0)
        if old_size > size:
            old_size = 0
        for _ in range(3):
            proof = TileReader(self._directory).consistency(old_size, size) if 0 < old_size <= size else []
            lines = "".join(base64.b64encode(node).decode() + "\n" for node in proof)
            status, answer = _post(witness, f"old {old_size}\n{lines}\n{note}")
            if status == HTTPStatus.CONFLICT and answer.strip().isdecimal() and int(answer) != old_size:
                old_size = int(answer)
                if old_size > size:
                    raise WitnessError(
                        f"The witness has seen {old_size} entries, the log has {size}: it was rolled back."
                    )
                continue
            if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                raise ConnectionError(f"the witness answers {status}")
            if status != HTTPStatus.OK:
                raise WitnessError(f"The witness refused ({status}): {answer.strip()[:200]}")
            try:
                verify_note(note + answer, witness.key)
                signatures = split_note(note + answer)[1]
            except NoteError as err:
                raise WitnessError(f"The witness's answer is no cosignature: {err}") from err
            if len(signatures) != len(split_note(note)[1]) + 1:
                raise WitnessError("The witness's answer holds more than its cosignature.")
            self._sizes[witness.key.name] = size
            return [answer]
        raise WitnessError("The witness names another size each time.")

    def _keep(self, note: str, lines: list[str]) -> None:
        """Write the cosigned checkpoint; cosignatures of other witnesses on the same checkpoint stay."""
        path = self._directory / "cosignatures"
        if path.exists() and (old := path.read_text()).startswith(note):
            names = [line.split(" ")[1] for line in lines]
            lines += [line for line in old[len(note) :].splitlines(keepends=True) if line.split(" ")[1] not in names]
        temporary = path.with_name(f".{path.name}")
        with temporary.open("w") as file:
            file.write(note + "".join(lines))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def _post(witness: WitnessAddress, body: str) -> tuple[int, str]:
    url = f"{witness.url.rstrip('/')}/add-checkpoint"
    request = Request(url, data=body.encode(), headers={"Content-Type": "text/plain"}, method="POST")  # noqa: S310
    context = ssl.create_default_context(cafile=witness.ca) if url.startswith("https://") else None
    try:
        with urlopen(request, timeout=_TIMEOUT_S, context=context) as response:  # noqa: S310 - WitnessAddress checks it
            return response.status, response.read(MAX_REQUEST_BYTES).decode("utf-8", "replace")
    except HTTPError as err:
        with err:
            return err.code, err.read(MAX_REQUEST_BYTES).decode("utf-8", "replace")
