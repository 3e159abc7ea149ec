"""Receipts over the API: a caller gets the proof of its own requests and of nobody else's."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

from server.audit.checkpoint import NoteError
from server.audit.proof import NotPublishedError, new_receipt
from server.audit.search import Query, SearchIndex
from server.audit.tail import journal_size
from server.audit.tiles import TileError
from server.errors import AuditUnavailableError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path

    from server.types import Principal

_MAX_DIGITS = 15


class Receipts:
    """Answers `GET /v1/audit/receipt/{id}`.

    Args:
        directory: The log.
        index_path: The search index, for ids that are request ids; None for the one beside the log.
    """

    def __init__(self, directory: Path, index_path: Path | None = None) -> None:
        self._directory = directory
        self._index_path = index_path

    async def find(self, reference: str, principal: Principal) -> dict[str, Any]:
        """Return the entry, its index, and its `.tlog-proof`.

        Args:
            reference: An index (the `x-strongroom-audit-index` header) or a request id.
            principal: Who asks; the entry must be of the same subject and tenant.

        Raises:
            NotFoundError: No such entry, or somebody else's: the caller can't tell which.
            AuditUnavailableError: The entry is not under a published checkpoint yet; a second later it is.
        """
        return await asyncio.to_thread(self._find, reference, principal)

    def _find(self, reference: str, principal: Principal) -> dict[str, Any]:
        missing = NotFoundError("There is no such audit record, or it is not yours.")
        is_index = reference.isascii() and reference.isdecimal() and len(reference) <= _MAX_DIGITS
        index = int(reference) if is_index else self._index_of(reference)
        if index is None:
            raise missing
        try:
            data, receipt = new_receipt(self._directory, index)
        except NotPublishedError as err:
            if index >= journal_size(self._directory):
                raise missing from err
            raise AuditUnavailableError(str(err), retry_after_s=1) from err
        except TileError as err:  # pruned
            raise missing from err
        except (NoteError, OSError) as err:
            raise AuditUnavailableError("The audit log can't be read; tell the operator.") from err
        owner = json.loads(data).get("principal", {})
        if (owner.get("subject"), owner.get("tenant")) != (principal.subject, principal.tenant):
            raise missing
        return {
            "object": "audit.receipt",
            "index": index,
            "entry": json.loads(data),
            "entry_base64": base64.b64encode(data).decode(),
            "proof": receipt.text(),
            "vkey": (self._directory / "vkey").read_text().strip(),
        }

    def _index_of(self, request_id: str) -> int | None:
        index = SearchIndex(self._directory, self._index_path)
        try:
            index.update()
            found = [at for at, _ in index.find(Query(request_id=request_id), limit=4)]
        finally:
            index.close()
        return min(found, default=None)
