"""Receipts: `.tlog-proof` files (C2SP tlog-proof) that show offline that an entry is in the log."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.audit.checkpoint import NoteError, VerifierKey, verify_checkpoint
from server.audit.merkle import HASH_BYTES, ProofError, leaf_hash, verify_inclusion
from server.audit.tiles import TileError, TileReader

if TYPE_CHECKING:
    from pathlib import Path

    from server.audit.checkpoint import Checkpoint

_FIRST_LINE = "c2sp.org/tlog-proof@v1"
_INDEX = re.compile(r"index (0|[1-9][0-9]{0,18})")
MAX_PROOF_BYTES = 65_536


class NotPublishedError(LookupError):
    """The entry is not under a published checkpoint: not yet, or there is none."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """A parsed `.tlog-proof`."""

    index: int
    path: list[bytes]
    note: str
    extra: bytes = b""

    def text(self) -> str:
        """Return the file's text."""
        lines = [_FIRST_LINE]
        if self.extra:
            lines.append(f"extra {base64.b64encode(self.extra).decode()}")
        lines.append(f"index {self.index}")
        lines += [base64.b64encode(node).decode() for node in self.path]
        return "\n".join(lines) + "\n\n" + self.note

    @classmethod
    def parse(cls, text: str) -> Receipt:
        """Read a `.tlog-proof`.

        Raises:
            ProofError: Malformed.
        """
        head, blank, note = text.partition("\n\n")
        lines = head.split("\n")
        if len(text) > MAX_PROOF_BYTES or not blank or lines.pop(0) != _FIRST_LINE or not lines:
            raise ProofError("Not a tlog-proof file.")
        try:
            extra = b""
            if lines[0].startswith("extra "):
                extra = base64.b64decode(lines.pop(0)[6:], validate=True)
            match = _INDEX.fullmatch(lines.pop(0))
            path = [base64.b64decode(line, validate=True) for line in lines]
        except (binascii.Error, IndexError, ValueError) as err:
            raise ProofError("The tlog-proof file is malformed.") from err
        if match is None or any(len(node) != HASH_BYTES for node in path):
            raise ProofError("The tlog-proof file is malformed.")
        return cls(int(match[1]), path, note, extra)


def new_receipt(directory: Path, index: int, *, extra: bytes = b"") -> tuple[bytes, Receipt]:
    """Return an entry and its receipt under the newest published checkpoint.

    Witness cosignatures are in it where the cosigned checkpoint covers the entry.

    Raises:
        NotPublishedError: No published checkpoint covers the entry.
        TileError: A tile is missing or damaged.
        NoteError: The checkpoint is malformed.
    """
    key = VerifierKey.parse((directory / "vkey").read_text())
    reader = TileReader(directory)
    for name in ("cosignatures", "checkpoint"):
        path = directory / name
        note = path.read_text() if path.exists() else ""
        if note and (size := verify_checkpoint(note, key).size) > index:
            return reader.entry(index, size), Receipt(index, reader.inclusion(index, size), note, extra)
    raise NotPublishedError(f"Entry {index} is not under a published checkpoint yet; try again in a second.")


def verify_receipt(receipt: Receipt, entry: bytes, key: VerifierKey, *witnesses: VerifierKey) -> Checkpoint:
    """Check that `entry` is in the log of `key`, and that each witness saw that log.

    Raises:
        ProofError: It is not, or the receipt does not show it.
    """
    try:
        checkpoint = verify_checkpoint(receipt.note, key)
        for witness in witnesses:
            verify_checkpoint(receipt.note, witness)
    except NoteError as err:
        raise ProofError(f"The receipt's checkpoint is refused: {err}") from err
    verify_inclusion(leaf_hash(entry), receipt.index, checkpoint.size, receipt.path, checkpoint.root)
    return checkpoint


__all__ = ["NotPublishedError", "Receipt", "TileError", "new_receipt", "verify_receipt"]
