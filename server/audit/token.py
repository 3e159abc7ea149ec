"""The log's Ed25519 key on a PKCS#11 token: the writer asks for each signature, and no process ever holds the key."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING

import pkcs11
import pkcs11.exceptions as problems
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass

from server.audit.checkpoint import ED25519, VerifierKey, check_key_name
from server.errors import ConfigError, KMSDeniedError, KMSError
from server.sealed.kms.pkcs11 import PKCS11Token, module_and_pin, parse_uri

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SCHEME = "pkcs11:"
_KEY_BYTES = 32
_DER_OCTETS = bytes([0x04, _KEY_BYTES])  # PKCS#11 wraps the point in an octet string; some tokens do not


class TokenSigner:
    """An Ed25519 key pair on a token, with one session that is opened again after a failure.

    One a process: opening a session starts the vendor's library anew, which ends other sessions.

    Args:
        name: The log's origin.
        module: Path of the vendor's library.
        token: Label of the token.
        label: Label of the key pair on it.
        pin: Returns the user's PIN.

    Raises:
        KMSError: Token or key can't be used.
    """

    def __init__(self, name: str, module: Path, token: str, label: str, *, pin: Callable[[], str]) -> None:
        self._where = f"{token}/{label}"
        self._label = label
        self._pin = pin
        self._refused_pin: str | None = None
        self._token = PKCS11Token(module, token, pin=self._next_pin)
        self._open = contextlib.ExitStack()
        self._private: pkcs11.PrivateKey | None = None
        self._public = b""
        self._connect()
        self._key = VerifierKey(name, ED25519, self._public)

    @property
    def key(self) -> VerifierKey:
        """The public key."""
        return self._key

    def sign(self, message: bytes) -> bytes:
        """Return the Ed25519 signature of `message`, made on the token.

        Raises:
            OSError: The token can't be used now; the next call tries again.
        """
        try:
            private = self._private or self._connect()
            signature: bytes = private.sign(message, mechanism=Mechanism.EDDSA)
        except (KMSError, ConfigError) as err:
            self.close()
            raise OSError(errno.ENODEV, str(err)) from err
        except (problems.PKCS11Error, RuntimeError) as err:
            self.close()
            raise OSError(errno.ENODEV, f"the key {self._where} does not sign ({type(err).__name__})") from err
        return signature

    def close(self) -> None:
        """Drop the session; `sign` opens another."""
        self._private = None
        with contextlib.suppress(problems.PKCS11Error, RuntimeError, KMSError):  # it may be the session that is broken
            self._open.close()

    def _connect(self) -> pkcs11.PrivateKey:
        try:
            session = self._open.enter_context(self._token.session())
        except KMSDeniedError:
            self._refused_pin = self._pin()
            raise
        try:
            return self._find(session)
        except KMSError:
            self.close()
            raise

    def _find(self, session: pkcs11.Session) -> pkcs11.PrivateKey:
        try:
            public = session.get_key(ObjectClass.PUBLIC_KEY, KeyType.EC_EDWARDS, self._label)
            private: pkcs11.PrivateKey = session.get_key(ObjectClass.PRIVATE_KEY, KeyType.EC_EDWARDS, self._label)
            point = bytes(public[Attribute.EC_POINT]).removeprefix(_DER_OCTETS)
            may_leave = bool(private[Attribute.EXTRACTABLE]) or not private[Attribute.SENSITIVE]
        except problems.NoSuchKey as err:
            raise KMSError(f"There is no Ed25519 key pair {self._where} on the token.") from err
        except problems.PKCS11Error as err:
            raise KMSError(f"The key {self._where} can't be read ({type(err).__name__}).") from err
        if may_leave:
            raise KMSDeniedError(f"The key {self._where} may leave the token. Make one that is sensitive.")
        if len(point) != _KEY_BYTES or self._public not in (b"", point):
            raise KMSError(f"The key {self._where} is not an Ed25519 key, or not the one that the log began with.")
        self._public, self._private = point, private
        return private

    def _next_pin(self) -> str:
        """Return the PIN, unless it is one that the token refused: a few more tries and it would lock itself."""
        pin = self._pin()
        if pin == self._refused_pin:
            raise KMSDeniedError(f"The token of {self._where} refused the PIN; it is not tried again until it changes.")
        return pin


def open_token(uri: str, *, name: str | None) -> TokenSigner:
    """Return the signer that `pkcs11:token=T;object=K` names; library and PIN file come from the environment.

    Raises:
        ConfigError: Something is missing.
        KMSError: Token or key can't be used.
    """
    if not name:
        raise ConfigError("A log whose key is on a token needs its origin too; the key itself bears no name.")
    check_key_name(name)
    token, label = parse_uri(uri.removeprefix(SCHEME))
    module, pin = module_and_pin()
    return TokenSigner(name, module, token, label, pin=pin)
