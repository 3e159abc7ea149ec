"""TLS of a listener: versions, ciphers, client certificates, and new certificates without a restart."""

from __future__ import annotations

import asyncio
import ssl
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# TLS 1.2 with forward secrecy and authenticated encryption only; what 1.3 offers is all of that kind.
CIPHERS_1_2 = "ECDHE+AESGCM:ECDHE+CHACHA20"
CHECK_S = 1.0


class TLSListener:
    """The TLS settings of one listener; `context` is handed to the server, and new files are put into it.

    Args:
        certificate: Chain, PEM, the server's own first.
        key: Private key, PEM.
        client_ca: Who may have signed client certificates; None asks for none. A new file takes a restart.
        require_client: Refuse clients without a certificate.

    Raises:
        ConfigError: A file is missing, damaged, or key and certificate don't fit.
    """

    def __init__(
        self, certificate: Path, key: Path, *, client_ca: Path | None = None, require_client: bool = False
    ) -> None:
        if require_client and client_ca is None:
            raise ConfigError("Client certificates are required, but no CA for them is set.")
        self._files = (certificate, key)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._stamp: tuple[tuple[int, int], ...] = self._look()
        self.context = _new_context(certificate, key)
        if client_ca is not None:
            try:
                self.context.load_verify_locations(client_ca)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError(f"The client CA {client_ca} can't be used ({_told(error)}).") from error
            self.context.verify_mode = ssl.CERT_REQUIRED if require_client else ssl.CERT_OPTIONAL

    def poll(self, hand_over: Callable[[Callable[[], None]], object] | None = None) -> bool:
        """Take new files over; return whether there were any. Connections that stand keep what they began with.

        Args:
            hand_over: Runs what it is given where no handshake can begin meanwhile; here and now where None.

        Raises:
            ConfigError: The new files can't be used; the old ones stay in use.
        """
        stamp = self._look()
        if stamp == self._stamp:
            return False
        # Tried on a context of its own first: half of a new pair must not reach the one in use.
        _new_context(*self._files)
        self._stamp = stamp
        if hand_over is None:
            self._take()
        else:
            hand_over(self._take)
        return True

    def _take(self) -> None:
        try:
            self.context.load_cert_chain(*self._files)
        except (OSError, ssl.SSLError):  # exchanged once more since they were tried: the next look finds them new
            self._stamp = ()

    def start(self) -> None:
        """Look for new files in a thread from now on.

        They are taken over on the running loop: a handshake that began between the loading of a certificate and of its
        key would fail.
        """
        loop = asyncio.get_running_loop()

        def run() -> None:
            while not self._stop.wait(CHECK_S):
                # Half of a pair was written: the other half comes, or the old pair goes on. Or the loop has ended.
                with suppress(ConfigError, RuntimeError):
                    self.poll(loop.call_soon_threadsafe)

        self._thread = threading.Thread(target=run, name="tls-reload", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)

    def _look(self) -> tuple[tuple[int, int], ...]:
        try:
            found = [path.stat() for path in self._files]
        except OSError as error:
            raise ConfigError(f"The TLS file {error.filename} can't be read ({error.strerror}).") from error
        return tuple((one.st_mtime_ns, one.st_size) for one in found)


def _new_context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(CIPHERS_1_2)
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password=_no_password)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"The TLS certificate {certificate} and its key can't be used ({_told(error)}).") from error
    return context


def _no_password() -> str:
    """Answer for OpenSSL, which would otherwise ask on the terminal and hang."""
    return ""


def _told(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or type(error).__name__)
