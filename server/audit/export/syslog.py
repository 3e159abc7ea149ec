"""Syslog over TLS: RFC 5424 messages, octet-counted as in RFC 5425."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import ssl
import termios
import time
from typing import TYPE_CHECKING, Any

from server.audit.entry import parse_entry
from server.audit.export.shapes import SHAPES, severity
from server.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

_FACILITY_LOG_AUDIT = 13
_SEND_BUFFER_BYTES = 128 * 1024  # what a dead receiver can take with it; small, since it is sent again
_TIMEOUT_S = 10.0
_TCP_ESTABLISHED = 1  # first byte of struct tcp_info, linux/tcp.h
_PEN = 32473  # RFC 5612: the enterprise number for examples and private use
_BOM = "\ufeff"


def _sd_value(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("]", "\\]")


class SyslogSink:
    """One receiver.

    Args:
        host: Its name, which its certificate must bear.
        port: 6514 by convention.
        origin: The log's origin.
        shape: `json`, `cef` or `ocsf`.
        ca: PEM file of the authority that vouches for it; None for the system's.
        certificate: PEM file with our certificate and key, where it wants one.

    Raises:
        ConfigError: The shape is unknown or a PEM file can't be read.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        origin: str,
        shape: str = "json",
        ca: Path | None = None,
        certificate: Path | None = None,
    ) -> None:
        if shape not in SHAPES:
            raise ConfigError(f"Unknown export format {shape!r}; expected one of {', '.join(SHAPES)}.")
        self._address = host, port
        self._origin = origin
        self._shape = SHAPES[shape]
        self._hostname = socket.gethostname()[:255] or "-"
        self._socket: ssl.SSLSocket | None = None
        try:
            self._context = ssl.create_default_context(cafile=str(ca) if ca else None)
            if certificate is not None:
                self._context.load_cert_chain(certificate)
        except (OSError, ssl.SSLError) as err:
            raise ConfigError(f"The TLS files of the syslog receiver {host} can't be read: {err}.") from err
        self._context.minimum_version = ssl.TLSVersion.TLSv1_2

    def message(self, index: int, data: bytes) -> bytes:
        """Return one entry's message, octet count included."""
        entry = parse_entry(data)
        body = self._shape(index, entry, data)
        return self._frame(severity(entry), entry["time"], entry["event"].replace(":", "."), index, body)

    def checkpoint_message(self, size: int, note: bytes, now: str) -> bytes:
        """Return a checkpoint's message, its line breaks escaped as in JSON: a record is one line."""
        text = note.decode().replace("\n", "\\n")
        return self._frame(6, now, "audit.checkpoint", size, f'{{"size":{size},"checkpoint":"{text}"}}')

    def _frame(self, level: int, at: str, message_id: str, index: int, body: str) -> bytes:
        header = (
            f"<{_FACILITY_LOG_AUDIT * 8 + level}>1 {at} {self._hostname} strongroom {os.getpid()} {message_id[:32]}"
        )
        data = f'[audit@{_PEN} index="{index}" origin="{_sd_value(self._origin)}"]'
        message = f"{header} {data} {_BOM}{body}".encode()
        return b"%d %b" % (len(message), message)

    def send(self, messages: list[bytes]) -> None:
        """Deliver messages in order; returns once the receiver's host has acknowledged every byte.

        Raises:
            OSError: Some may not have arrived; send all of them again.
        """
        try:
            stream = self._socket or self._connect()
            stream.sendall(b"".join(messages))
            self._drain(stream)
        except OSError:
            self.close()
            raise

    def _connect(self) -> ssl.SSLSocket:
        plain = socket.create_connection(self._address, _TIMEOUT_S)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        try:
            self._socket = self._context.wrap_socket(plain, server_hostname=self._address[0])
        except OSError:
            plain.close()
            raise
        return self._socket

    @staticmethod
    def _drain(stream: ssl.SSLSocket) -> None:
        """Wait until TCP has nothing unacknowledged: syslog itself never answers."""
        end_s = time.monotonic() + _TIMEOUT_S
        left = array.array("i", [0])
        while True:
            # A reset socket keeps its unacknowledged bytes and reports no error here; a closed peer reads no more.
            if stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _TCP_ESTABLISHED:
                raise ConnectionResetError("the syslog receiver closed the connection")
            fcntl.ioctl(stream.fileno(), termios.TIOCOUTQ, left)
            if not left[0]:
                return
            if time.monotonic() > end_s:
                raise TimeoutError("the syslog receiver acknowledges nothing")
            time.sleep(0.001)

    def close(self) -> None:
        """Drop the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def fields_of(message: bytes) -> dict[str, Any]:
    """Return the parts of a message that `SyslogSink` made; for receivers in tests and tools."""
    head, _, rest = message.decode().partition(" [audit@")
    priority, at, host, app, process, message_id = head.split(" ")
    data, _, body = rest.partition(f"] {_BOM}")
    index = int(data.split('index="')[1].split('"')[0])
    return {
        "priority": int(priority[1:].split(">")[0]),
        "time": at,
        "host": host,
        "app": app,
        "process": process,
        "message_id": message_id,
        "index": index,
        "body": body,
    }
