"""A witness: cosigns checkpoints of logs it knows, refuses forks and rollbacks (C2SP tlog-witness)."""

from __future__ import annotations

import base64
import binascii
import json
import os
import threading
import time
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, NamedTuple

from typing_extensions import override

from server.audit.checkpoint import NoteError, cosign, split_note, verify_checkpoint
from server.audit.log import sync_folder
from server.audit.merkle import ProofError, verify_consistency

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from server.audit.checkpoint import Checkpoint, Signer, VerifierKey

MAX_REQUEST_BYTES = 64 * 1024
_MAX_PROOF_LINES = 63
_TIMEOUT_S = 10.0


class Answer(NamedTuple):
    """What the witness says: an HTTP status, a body, a content type."""

    status: HTTPStatus
    body: str
    content_type: str = "text/plain; charset=utf-8"


class Witness:
    """Remembers the newest checkpoint of each log and cosigns only what extends it.

    Args:
        signer: The witness's key, of the cosignature type.
        logs: Public keys of the logs it watches.
        state: A folder of its own; one file a log.
        clock: The wall clock, seconds.
    """

    def __init__(
        self, signer: Signer, logs: tuple[VerifierKey, ...], state: Path, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._signer = signer
        self._logs = {key.name: key for key in logs}
        self._state = state
        self._clock = clock
        self._lock = threading.Lock()
        state.mkdir(mode=0o700, parents=True, exist_ok=True)

    def add_checkpoint(self, body: str) -> Answer:
        """Answer one `add-checkpoint` request; the steps and statuses are those of tlog-witness."""
        try:
            old_size, proof, note = _parse_request(body)
            origin = note.split("\n", 1)[0]
        except (NoteError, ProofError) as err:
            return Answer(HTTPStatus.BAD_REQUEST, f"{err}\n")
        key = self._logs.get(origin)
        if key is None:
            return Answer(HTTPStatus.NOT_FOUND, "This witness does not know the log.\n")
        try:
            checkpoint = verify_checkpoint(note, key)
        except NoteError as err:
            return Answer(HTTPStatus.FORBIDDEN, f"{err}\n")
        if old_size > checkpoint.size:
            return Answer(HTTPStatus.BAD_REQUEST, "The old size is beyond the checkpoint.\n")
        with self._lock:  # comparing and storing must be one step, or two requests could roll the log back
            return self._extend(old_size, proof, note, checkpoint)

    def _extend(self, old_size: int, proof: list[bytes], note: str, checkpoint: Checkpoint) -> Answer:
        known_size, known_root = self.newest(checkpoint.origin)
        if old_size != known_size:
            return Answer(HTTPStatus.CONFLICT, f"{known_size}\n", "text/x.tlog.size")
        if old_size == checkpoint.size and checkpoint.size and checkpoint.root != known_root:
            self._keep_evidence(note)
            return Answer(HTTPStatus.CONFLICT, f"{known_size}\n", "text/x.tlog.size")
        try:
            if old_size:
                verify_consistency(old_size, checkpoint.size, proof, known_root, checkpoint.root)
            elif proof:
                raise ProofError("A proof from size 0 must be empty.")
        except ProofError as err:
            self._keep_evidence(note)
            return Answer(HTTPStatus.UNPROCESSABLE_ENTITY, f"{err}\n")
        self._store(checkpoint, note)
        return Answer(HTTPStatus.OK, cosign(split_note(note)[0], self._signer, int(self._clock())))

    def newest(self, origin: str) -> tuple[int, bytes]:
        """Return size and root of the newest checkpoint that was cosigned; 0 if there is none."""
        path = self._path(origin)
        if not path.exists():
            return 0, b""
        fields = json.loads(path.read_text())
        return int(fields["size"]), bytes.fromhex(fields["root"])

    def _path(self, origin: str) -> Path:
        name = origin.encode().hex()
        return self._state / f"{name if len(name) <= 200 else sha256(origin.encode()).hexdigest()}.json"

    def _store(self, checkpoint: Checkpoint, note: str) -> None:
        path = self._path(checkpoint.origin)
        temporary = path.with_suffix(".new")
        fields = {"origin": checkpoint.origin, "size": checkpoint.size, "root": checkpoint.root.hex(), "note": note}
        with temporary.open("w") as file:
            json.dump(fields, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)

    def _keep_evidence(self, note: str) -> None:
        """Keep what the log signed and should not have: it proves a fork to anybody."""
        path = self._state / f"conflict-{sha256(note.encode()).hexdigest()[:32]}.note"
        if not path.exists():  # a log that asks again with the same checkpoint proves nothing new
            path.write_text(note)


def _parse_request(body: str) -> tuple[int, list[bytes], str]:
    head, blank, note = body.partition("\n\n")
    first, *lines = head.split("\n")
    size = first.removeprefix("old ")
    if not blank or not first.startswith("old ") or not size.isascii() or not size.isdecimal() or len(size) > 19:
        raise ProofError(
            "Not an add-checkpoint request: expected 'old SIZE', proof lines, an empty line, a checkpoint."
        )
    if str(int(size)) != size or len(lines) > _MAX_PROOF_LINES:
        raise ProofError("The old size is not canonical, or the proof has too many lines.")
    try:
        proof = [base64.b64decode(line, validate=True) for line in lines]
    except binascii.Error as err:
        raise ProofError("A proof line is not base64.") from err
    if any(len(node) != 32 for node in proof):
        raise ProofError("A proof line is not a hash.")
    split_note(note)
    return int(size), proof, note


def make_server(witness: Witness, host: str, port: int) -> ThreadingHTTPServer:
    """Return an HTTP server for `POST /add-checkpoint`; what it is told is signed, so it needs no other secret."""

    class Handler(BaseHTTPRequestHandler):
        """One request."""

        timeout = _TIMEOUT_S
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            """Answer, and close the connection on anything odd."""
            length = self.headers.get("Content-Length", "")
            if self.path != "/add-checkpoint":
                answer = Answer(HTTPStatus.NOT_FOUND, "POST /add-checkpoint\n")
            elif not length.isdecimal() or int(length) > MAX_REQUEST_BYTES:
                answer = Answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The request is too large.\n")
            else:
                body = self.rfile.read(int(length)).decode("utf-8", "replace")
                answer = witness.add_checkpoint(body)
            data = answer.body.encode()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = True

        @override
        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the state folder has what matters."""

    return ThreadingHTTPServer((host, port), Handler)
