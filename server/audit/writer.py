"""The audit writer: a process that holds the signing key and appends what others send over a unix socket.

One loop: take all that has arrived, commit it with one fdatasync, answer, and only then publish. What
arrives during the sync is the next group, so groups grow with the load and nobody waits for a timer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.audit.checkpoint import load_audit_key
from server.audit.entry import encode_entry, new_entry, parse_entry
from server.audit.log import SEGMENT_BYTES, AuditLog
from server.audit.tags import Event
from server.audit.tiles import TileError, pack_entries, split_entries
from server.audit.writer_protocol import ACK, DURABLE, LENGTH, MAX_MESSAGE_BYTES, REFUSED, UNAVAILABLE
from server.errors import AuditLogError, ConfigError, StartError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from server.audit.checkpoint import Signer

_MAX_GROUP_BYTES = 8 << 20
_MAX_UNSENT_BYTES = 4 << 20
_READ_BYTES = 256 * 1024
_OPENED = f'"event":"{Event.REQUEST_ACCEPTED}"'.encode()
_CLOSED = f'"event":"{Event.REQUEST_FINISHED}"'.encode()
_SEGMENT = f'"event":"{Event.SEGMENT_OPENED}"'.encode()
_ID = b'"request_id":"'
_IDS_PER_ENTRY = 200
_PEER = struct.Struct("3i")


def request_id_of(entry: bytes) -> bytes:
    """Return the request id in a canonical entry, without parsing it.

    A quote inside a JSON string is escaped, so the pattern can only be a key of the entry.
    """
    start = entry.find(_ID)
    if start < 0:
        return b""
    start += len(_ID)
    return entry[start : entry.index(b'"', start)]


def is_well_formed(entry: bytes) -> bool:
    """Whether an entry can be one canonical JSON object on one line; the full check is the verifier's."""
    return len(entry) >= 2 and entry[0] == 0x7B and entry[-1] == 0x7D and b"\n" not in entry and b"\r" not in entry


def follow(open_ids: dict[bytes, None], entry: bytes) -> None:
    """Keep `open_ids` at the requests that are accepted and not finished, one entry after the other."""
    if _OPENED in entry:
        open_ids[request_id_of(entry)] = None
    elif _CLOSED in entry:
        open_ids.pop(request_id_of(entry), None)
    elif _SEGMENT in entry:
        open_ids.update({_raw_id(request_id): None for request_id in parse_entry(entry)["open"]})


def _raw_id(request_id: str) -> bytes:
    return json.dumps(request_id, ensure_ascii=False).encode()[1:-1]


class _Connection:
    """One client: what it sent and what it is owed."""

    __slots__ = ("incoming", "open_ids", "outgoing", "sock")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.open_ids: set[bytes] = set()


class Writer:
    """Serves one log on one socket until it is told to stop.

    Args:
        log: The open log.
        sock: A unix socket from `bind`.
        orphans: Requests that recovery found open.
        publish_interval_s: How long tiles and `checkpoint` may lag behind.
        heartbeat_s: After how much silence a heartbeat is appended.
    """

    def __init__(
        self,
        log: AuditLog,
        sock: socket.socket,
        *,
        orphans: Iterable[bytes] = (),
        publish_interval_s: float = 0.2,
        heartbeat_s: float = 60.0,
    ) -> None:
        self._log = log
        self._listener = sock
        self._publish_interval_s = publish_interval_s
        self._heartbeat_s = heartbeat_s
        self._selector = selectors.DefaultSelector()
        self._open: dict[bytes, _Connection | None] = dict.fromkeys(orphans)
        self._dirty: dict[int, _Connection] = {}
        self._own: list[bytes] = []
        self._stop = False
        self._failed_since = 0.0
        self._num_refused = 0
        self._last_commit_s = time.monotonic()
        self._next_publish_s = 0.0
        self._rotate_at_s = 0.0
        self._syncer: threading.Thread | None = None
        self._wake, self._waker = socket.socketpair()
        self._waker.setblocking(False)

    # Start and stop -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Write down what recovery did and that the log is open.

        Raises:
            OSError: The log cannot be written.
        """
        log = self._log
        if log.cut_bytes or log.rebuilt_tiles:
            self._say(Event.LOG_RECOVERED, cut_bytes=log.cut_bytes, rebuilt_tiles=log.rebuilt_tiles)
        self._close_orphans(list(self._open), "the writer stopped while it ran")
        self._say(Event.LOG_STARTED, origin=log.origin, size=log.tree.size)
        self._commit_own()
        log.publish()
        self._listener.listen(64)  # not before: whoever can connect finds a log that has recovered

    def stop(self, *_signal: object) -> None:
        """Make `run` return after the group at hand."""
        self._stop = True
        with suppress(OSError):
            self._waker.send(b"x")

    def run(self) -> None:
        """Serve until `stop`."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake, selectors.EVENT_READ)
        while not self._stop:
            for key, mask in self._selector.select(self._wait_s()):
                if key.data is None:
                    if key.fileobj is self._listener:
                        self._accept()
                elif mask & selectors.EVENT_WRITE and not self._flush(key.data):
                    continue
                elif mask & selectors.EVENT_READ:
                    self._read(key.data)
            self._turn()
        self._finish()

    def _finish(self) -> None:
        self._close_orphans(list(self._open), "the writer was stopped while it ran")
        self._say(Event.LOG_STOPPED, size=self._log.tree.size)
        with suppress(OSError):  # reported below; the next start recovers
            self._commit_own()
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._flush(key.data)
                key.data.sock.close()
        self._selector.close()
        for sock in (self._listener, self._wake, self._waker):
            sock.close()
        if self._syncer is not None:
            self._syncer.join()
        try:
            self._log.close()
        except OSError as err:
            report("error", "audit log closed unclean", error=str(err))

    def _wait_s(self) -> float:
        if self._dirty:
            return 0.0
        if self._own:
            return 0.1
        now_s = time.monotonic()
        if not self._log.is_published:
            return max(0.0, self._next_publish_s - now_s)
        return max(0.01, self._last_commit_s + self._heartbeat_s - now_s)

    # One turn of the loop -----------------------------------------------------------------------------------------

    def _turn(self) -> None:
        pending: list[tuple[_Connection, list[bytes], bytes]] = []
        total = 0
        while self._dirty and total < _MAX_GROUP_BYTES:
            _, connection = self._dirty.popitem()
            for packed in self._messages(connection):
                try:
                    entries = split_entries(packed)
                except TileError:
                    self._drop(connection, "a message's lengths do not add up")
                    break
                total += len(packed)
                pending.append((connection, entries, packed))
        now_s = time.monotonic()
        if pending:
            self._append(pending)
        elif now_s - self._last_commit_s >= self._heartbeat_s:
            self._last_commit_s = now_s
            self._say(Event.LOG_HEARTBEAT, size=self._log.tree.size)
        if self._own:
            with suppress(OSError):  # reported where it was raised; they stay until the disk is back
                self._commit_own()
        self._housekeep(busy=bool(pending))

    def _messages(self, connection: _Connection) -> list[bytes]:
        buffer, messages, at = connection.incoming, list[bytes](), 0
        end = len(buffer)
        while end - at >= LENGTH.size:
            (length,) = LENGTH.unpack_from(buffer, at)
            if length > MAX_MESSAGE_BYTES:
                self._drop(connection, "a message is too long")
                return messages
            stop = at + LENGTH.size + length
            if stop > end:
                break
            messages.append(bytes(buffer[at + LENGTH.size : stop]))
            at = stop
        if at:
            del buffer[:at]
        return messages

    def _append(self, pending: list[tuple[_Connection, list[bytes], bytes]]) -> None:
        """Commit what every connection sent, and owe each its answers in order."""
        # Its own entries go first: what a new segment says of open requests must precede what happens to them next.
        own = self._own
        accepted: list[bytes] = own.copy()
        bodies: list[bytes] = [pack_entries(own)] if own else []
        answers: list[tuple[_Connection, int, int]] = []  # status, count
        changes: list[tuple[bytes, _Connection | None, bool]] = []
        for connection, entries, packed in pending:
            refused = [not self._admit(entry, connection, changes) for entry in entries]
            if not any(refused):
                accepted += entries
                bodies.append(packed)
                answers.append((connection, DURABLE, len(entries)))
                continue
            for entry, is_refused in zip(entries, refused, strict=True):
                if not is_refused:
                    accepted.append(entry)
                    bodies.append(pack_entries([entry]))
                answers.append((connection, REFUSED if is_refused else DURABLE, 1))
        try:
            self._own = []
            first = len(own) + self._commit(b"".join(bodies), accepted) if accepted else 0
        except OSError:
            self._own = own + self._own
            self._undo(changes)
            self._num_refused += len(accepted) - len(own)
            answers = [(connection, max(status, UNAVAILABLE), count) for connection, status, count in answers]
            first = 0
        for connection, status, count in answers:
            connection.outgoing += ACK.pack(status, first if status == DURABLE else 0, count)
            if status == DURABLE:
                first += count
        for connection in {id(connection): connection for connection, _, _ in answers}.values():
            self._flush(connection)

    def _admit(
        self, entry: bytes, connection: _Connection, changes: list[tuple[bytes, _Connection | None, bool]]
    ) -> bool:
        if not is_well_formed(entry):
            return False
        if _CLOSED in entry:
            request_id = request_id_of(entry)
            if request_id not in self._open:
                return False
            owner = self._open.pop(request_id)
            if owner is not None:
                owner.open_ids.discard(request_id)
            changes.append((request_id, owner, False))
        elif _OPENED in entry:
            request_id = request_id_of(entry)
            if not request_id or request_id in self._open:
                return False
            self._open[request_id] = connection
            connection.open_ids.add(request_id)
            changes.append((request_id, connection, True))
        return True

    def _undo(self, changes: list[tuple[bytes, _Connection | None, bool]]) -> None:
        for request_id, owner, was_opened in reversed(changes):
            if was_opened:
                self._open.pop(request_id, None)
                if owner is not None:
                    owner.open_ids.discard(request_id)
            else:
                self._open[request_id] = owner
                if owner is not None:
                    owner.open_ids.add(request_id)

    def _commit(self, packed: bytes, entries: list[bytes]) -> int:
        try:
            first = self._log.commit(packed, entries)
        except OSError as err:
            if not self._failed_since:
                self._failed_since = time.monotonic()
                report("critical", "audit log can't be written; nothing is answered", error=str(err))
            raise
        self._last_commit_s = time.monotonic()
        if self._failed_since:
            seconds = self._last_commit_s - self._failed_since
            self._failed_since = 0.0
            self._say(Event.LOG_INTERRUPTED, seconds=round(seconds), num_refused=self._num_refused)
            self._num_refused = 0
            report("warning", "audit log can be written again", seconds=round(seconds, 1))
        return first

    # The writer's own entries -------------------------------------------------------------------------------------

    def _say(self, event: Event, **fields: Any) -> None:
        self._own.append(encode_entry(new_entry(event, **fields)))

    def _close_orphans(self, request_ids: list[bytes], reason: str) -> None:
        for request_id in request_ids:
            self._open.pop(request_id, None)
            self._say(
                Event.REQUEST_FINISHED,
                request_id=json.loads(b'"' + request_id + b'"'),
                outcome="unknown",
                code="audit_orphan",
                reason=reason,
            )

    def _commit_own(self) -> None:
        own = self._own
        if own:
            self._own = []
            try:
                self._commit(pack_entries(own), own)
            except OSError:
                self._own = own + self._own
                raise

    def _housekeep(self, *, busy: bool) -> None:
        """Publish, rotate and sync tiles, when it costs no request anything or is due."""
        log, now_s = self._log, time.monotonic()
        try:
            if not log.is_published and now_s >= self._next_publish_s:
                log.publish()
                self._next_publish_s = now_s + self._publish_interval_s
            if log.is_segment_full and now_s >= self._rotate_at_s and self._are_tiles_durable():
                digest = log.rotate()
                ids = [json.loads(b'"' + request_id + b'"') for request_id in self._open]
                for start in range(0, max(1, len(ids)), _IDS_PER_ENTRY):
                    entry = new_entry(Event.SEGMENT_OPENED, open=ids[start : start + _IDS_PER_ENTRY])
                    if not start:
                        entry["previous_sha256"] = digest
                    self._own.insert(start // _IDS_PER_ENTRY, encode_entry(entry))
                self._commit_own()
            elif not busy and log.is_published and self._syncer is None:
                log.sync_tile()
        except (OSError, TileError) as err:
            self._next_publish_s = self._rotate_at_s = now_s + 1.0
            report("error", "audit tiles can't be published", error=str(err))

    def _are_tiles_durable(self) -> bool:
        """Start making the closing segment's tiles durable, off the loop; return whether that is done."""
        if self._syncer is None:
            self._syncer = threading.Thread(target=self._sync_tiles, name="audit tiles", daemon=True)
            self._syncer.start()
            return False
        if self._syncer.is_alive():
            return False
        self._syncer = None
        return True

    def _sync_tiles(self) -> None:
        try:
            self._log.sync_tiles()
        except OSError as err:  # they stay in the log's queue; closing the segment syncs them one by one
            report("error", "audit tiles can't be made durable", error=str(err))

    # Sockets ------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        with suppress(BlockingIOError, ConnectionError):
            sock, _ = self._listener.accept()
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            _, uid, _ = _PEER.unpack(credentials)
            if uid not in (0, os.geteuid()):  # the folder keeps others out already; this is the second lock
                report("error", "refused a client of another user", uid=uid)
                sock.close()
                return
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ, _Connection(sock))

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(connection, "")
            return
        connection.incoming += data
        self._dirty[id(connection)] = connection

    def _flush(self, connection: _Connection) -> bool:
        if not connection.outgoing:
            return True
        try:
            sent = connection.sock.send(connection.outgoing)
            del connection.outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection, "")
            return False
        if len(connection.outgoing) > _MAX_UNSENT_BYTES:
            self._drop(connection, "a client does not read its answers")
            return False
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.outgoing else 0)
        if self._selector.get_key(connection.sock).events != events:
            self._selector.modify(connection.sock, events, connection)
        return True

    def _drop(self, connection: _Connection, why: str) -> None:
        if why:
            report("error", "dropped an audit client", reason=why)
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection.sock)
        connection.sock.close()
        connection.incoming.clear()
        self._dirty.pop(id(connection), None)
        self._close_orphans(sorted(connection.open_ids), "the process that ran it went away")
        connection.open_ids.clear()


def report(level: str, message: str, **fields: object) -> None:
    """Say one thing on standard error, one JSON object a line; the supervisor's log collects it."""
    line = {"level": level, "logger": "audit.writer", "message": message, **fields}
    sys.stderr.write(json.dumps(line) + "\n")
    sys.stderr.flush()


def bind(path: Path) -> socket.socket:
    """Bind `path`, mode 0600, in place of a socket that a dead writer left; `Writer.start` listens on it.

    Call it with the log's lock held: that is what proves the other writer dead.

    Raises:
        AuditLogError: The socket can't be made.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            path.unlink()
        old_mask = os.umask(0o177)
        try:
            sock.bind(str(path))
        finally:
            os.umask(old_mask)
    except OSError as err:
        sock.close()
        raise AuditLogError(f"The audit socket {path} can't be made: {err.strerror or err}.") from err
    return sock


def open_signer(key: str, origin: str | None) -> Signer:
    """Return who signs: a private key file with its .vkey beside it, or a key on a token (`pkcs11:…`).

    Raises:
        StartError: It can't be used.
    """
    if not key.startswith("pkcs11:"):
        return load_audit_key(Path(key))
    try:
        from server.audit.token import open_token  # a package of its own, which only a token needs
    except ImportError as err:
        raise ConfigError("A key on a token needs the package: pip install 'strongroom[kms-pkcs11]'.") from err
    return open_token(key, name=origin)


def serve(
    directory: Path,
    key: str,
    path: Path,
    *,
    origin: str | None = None,
    segment_bytes: int = SEGMENT_BYTES,
    publish_interval_s: float = 0.2,
    heartbeat_s: float = 60.0,
) -> None:
    """Recover the log and serve it until SIGTERM.

    Raises:
        StartError: The log, the key or the socket is refused.
    """
    # Whoever can connect may also stop us: until the handler stands, SIGTERM waits.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    orphans: dict[bytes, None] = {}
    log = AuditLog(
        directory,
        open_signer(key, origin),
        segment_bytes=segment_bytes,
        on_entry=lambda entry: follow(orphans, entry),
    )
    sock = bind(path)
    writer = Writer(log, sock, orphans=orphans, publish_interval_s=publish_interval_s, heartbeat_s=heartbeat_s)
    signal.signal(signal.SIGTERM, writer.stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the supervisor stops the writer last
    try:
        writer.start()
    except OSError as err:
        log.release()
        raise AuditLogError(f"The audit log in {directory} can't be written: {err.strerror}.") from err
    writer.run()
    path.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """Run the writer process; the supervisor starts it."""
    parser = argparse.ArgumentParser(
        prog="python -m server.audit.writer", description="The audit log's writer process."
    )
    parser.add_argument("--dir", type=Path, required=True, help="the log's folder")
    parser.add_argument("--key", required=True, help="the private key's file, its .vkey beside it; or pkcs11:token=…")
    parser.add_argument("--origin", help="the log's name, where the key is on a token and so bears none")
    parser.add_argument("--socket", type=Path, required=True, help="where clients connect")
    parser.add_argument("--segment-bytes", type=int, default=SEGMENT_BYTES, help="when a journal segment is full")
    parser.add_argument("--publish-interval-s", type=float, default=0.2, help="how long tiles may lag behind")
    parser.add_argument("--heartbeat-s", type=float, default=60.0, help="after how much silence to append a heartbeat")
    parser.add_argument("--die-with-parent", action="store_true", help="stop when the process that started it dies")
    args = parser.parse_args(argv)
    if args.die_with_parent:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() == 1:
            return 1
    try:
        serve(
            args.dir,
            args.key,
            args.socket,
            origin=args.origin,
            segment_bytes=args.segment_bytes,
            publish_interval_s=args.publish_interval_s,
            heartbeat_s=args.heartbeat_s,
        )
    except StartError as err:
        report("critical", str(err), code=err.code)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
