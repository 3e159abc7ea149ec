"""PKCS#11 HSM: AES-GCM with the context as associated data; the key never leaves (URI `pkcs11:token=T;object=K`)."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

import pkcs11
import pkcs11.exceptions as problems
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import Hash
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pkcs11 import Attribute, GCMParams, KeyType, Mechanism, ObjectClass
from pkcs11.util.ec import encode_ec_public_key, encode_ecdsa_signature

from server.errors import ConfigError, KMSDeniedError, KMSDisabledError, KMSError, KMSUnreachableError
from server.sealed.format import TAG_BYTES, Recipient
from server.sealed.kms.base import DATA_KEY_BYTES, DataKey, wrong_key
from server.sealed.signature import hash_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from server.sealed.kms.base import KeyContext

MECHANISM: Final = "pkcs11"
MODULE_ENV: Final = "STRONGROOM_PKCS11_MODULE"
PIN_FILE_ENV: Final = "STRONGROOM_PKCS11_PIN_FILE"
_NONCE_BYTES: Final = 12


class PKCS11KMS:
    """One AES key of one token. A session is opened for each call: a release is rare, and a token may be taken out.

    Args:
        module: Path of the vendor's library.
        token: Label of the token.
        label: Label of the AES key on it.
        pin: Returns the user's PIN.
    """

    mechanism = MECHANISM

    def __init__(self, module: Path, token: str, label: str, *, pin: Callable[[], str]) -> None:
        self._token = PKCS11Token(module, token, pin=pin)
        self._label = label
        self.key_id = f"{token}/{label}"

    def wrap(self, data_key: DataKey, context: KeyContext) -> Recipient:
        """Encrypt the data key inside the HSM."""
        # The nonce is ours, not the token's: 96 random bits, far below 2^32 wraps under one key.
        nonce = secrets.token_bytes(_NONCE_BYTES)
        with self._token.session() as session:
            key = self._find(session)
            params = GCMParams(nonce, context.canonical(), TAG_BYTES * 8)
            sealed: bytes = key.encrypt(bytes(data_key.reveal()), mechanism=Mechanism.AES_GCM, mechanism_param=params)
        return Recipient(MECHANISM, self.key_id, nonce + sealed)

    def unwrap(self, recipient: Recipient, context: KeyContext) -> DataKey:
        """Decrypt inside the HSM what `wrap` made."""
        nonce, sealed = recipient.wrapped[:_NONCE_BYTES], recipient.wrapped[_NONCE_BYTES:]
        if len(sealed) != DATA_KEY_BYTES + TAG_BYTES:
            raise wrong_key("the wrapped key has the wrong size")
        with self._token.session() as session:
            key = self._find(session)
            params = GCMParams(nonce, context.canonical(), TAG_BYTES * 8)
            try:
                return DataKey(key.decrypt(sealed, mechanism=Mechanism.AES_GCM, mechanism_param=params))
            except (problems.EncryptedDataInvalid, problems.EncryptedDataLenRange, problems.GeneralError) as err:
                raise wrong_key("wrong context, another key or a damaged wrapped key") from err

    def _find(self, session: pkcs11.Session) -> pkcs11.SecretKey:
        try:
            key: pkcs11.SecretKey = session.get_key(
                object_class=ObjectClass.SECRET_KEY, key_type=KeyType.AES, label=self._label
            )
        except problems.NoSuchKey as err:
            raise KMSDisabledError(f"The key {self.key_id} is not on the token any more (or never was).") from err
        if key[Attribute.EXTRACTABLE] or not key[Attribute.SENSITIVE]:
            raise KMSDeniedError(
                f"The key {self.key_id} may leave the HSM. Make one that is sensitive, not extractable."
            )
        return key


class PKCS11Signer:
    """An ECDSA private key on a token, for signing models.

    Args:
        module: Path of the vendor's library.
        token: Label of the token.
        label: Label of the key pair on it.
        pin: Returns the user's PIN.

    Raises:
        KMSError: Token or key can't be used.
    """

    def __init__(self, module: Path, token: str, label: str, *, pin: Callable[[], str]) -> None:
        self._token = PKCS11Token(module, token, pin=pin)
        self._label = label
        with self._token.session() as session:
            try:
                public = session.get_key(object_class=ObjectClass.PUBLIC_KEY, key_type=KeyType.EC, label=label)
            except problems.NoSuchKey as err:
                raise KMSDisabledError(f"The key pair {token}/{label} is not on the token.") from err
            key = load_der_public_key(encode_ec_public_key(public))
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise KMSError(f"The key pair {token}/{label} is not on an elliptic curve.")
        self.public_key = key

    def sign(self, message: bytes) -> bytes:
        """Return the DER ECDSA signature over `message`, made inside the HSM."""
        digest = Hash(hash_for(self.public_key))
        digest.update(message)
        with self._token.session() as session:
            try:
                private = session.get_key(object_class=ObjectClass.PRIVATE_KEY, key_type=KeyType.EC, label=self._label)
            except problems.NoSuchKey as err:
                raise KMSDisabledError(f"The private key {self._label} is not on the token any more.") from err
            raw: bytes = private.sign(digest.finalize(), mechanism=Mechanism.ECDSA)
        return bytes(encode_ecdsa_signature(raw))


class PKCS11Token:
    """A token, found by its label; sessions with errors told apart."""

    def __init__(self, module: Path, label: str, *, pin: Callable[[], str]) -> None:
        self._module, self._label, self._pin = module, label, pin

    def session(self) -> contextlib.AbstractContextManager[pkcs11.Session]:
        """Open a session as the user.

        Raises:
            KMSUnreachableError: No library, no token, or the device fails.
            KMSDeniedError: The PIN is wrong or locked.
        """
        return self._session()

    @contextlib.contextmanager
    def _session(self) -> Iterator[pkcs11.Session]:
        where = f"the PKCS#11 token {self._label!r}"
        try:
            library = pkcs11.lib(str(self._module))
            library.reinitialize()  # a token that was put in or taken out since is seen only then
            with library.get_token(token_label=self._label).open(user_pin=self._pin()) as session:
                yield session
        except (problems.PinIncorrect, problems.PinLocked, problems.PinExpired, problems.PinInvalid) as err:
            raise KMSDeniedError(f"The PIN for {where} is wrong, expired or locked ({type(err).__name__}).") from err
        except (problems.KeyHandleInvalid, problems.FunctionRejected, problems.UserNotLoggedIn) as err:
            raise KMSDeniedError(f"The HSM refused ({type(err).__name__}) on {where}.") from err
        except (problems.PKCS11Error, RuntimeError) as err:
            raise KMSUnreachableError(f"There is no answer from {where} ({type(err).__name__}).") from err


def from_environment(rest: str) -> PKCS11KMS:
    """Return the key that `pkcs11:token=T;object=K` names.

    STRONGROOM_PKCS11_MODULE is the vendor's library, STRONGROOM_PKCS11_PIN_FILE a file with the user's PIN.

    Raises:
        ConfigError: Something is missing.
    """
    token, label = parse_uri(rest)
    module, pin = module_and_pin()
    return PKCS11KMS(module, token, label, pin=pin)


def signer_from_environment(rest: str) -> PKCS11Signer:
    """Return the signer that `pkcs11:token=T;object=K` names."""
    token, label = parse_uri(rest)
    module, pin = module_and_pin()
    return PKCS11Signer(module, token, label, pin=pin)


def parse_uri(rest: str) -> tuple[str, str]:
    """Return token and object label of an RFC 7512 URI's path.

    Raises:
        ConfigError: Either is missing, or there is more.
    """
    fields = dict(item.partition("=")[::2] for item in rest.split(";"))
    if fields.keys() != {"token", "object"} or not all(fields.values()):
        raise ConfigError(f"The URI 'pkcs11:{rest}' must be pkcs11:token=LABEL;object=LABEL and no more.")
    return unquote(fields["token"]), unquote(fields["object"])


def module_and_pin() -> tuple[Path, Callable[[], str]]:
    """Return the vendor's library and how to get the PIN.

    Raises:
        ConfigError: Either is not configured.
    """
    module, pin_file = os.environ.get(MODULE_ENV), os.environ.get(PIN_FILE_ENV)
    if not module or not pin_file:
        raise ConfigError(f"A PKCS#11 key needs {MODULE_ENV} (the vendor's library) and {PIN_FILE_ENV}.")

    def pin() -> str:
        try:
            return Path(pin_file).read_text().strip()
        except OSError as err:
            raise ConfigError(f"The PIN file {pin_file} cannot be read: {err.strerror}.") from err

    return Path(module), pin
