"""OpenBao or HashiCorp Vault Transit: a derived key that takes the context (URI `openbao:MOUNT/KEY`)."""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import hvac
import hvac.exceptions
import requests

from server.errors import ConfigError, KMSDeniedError, KMSDisabledError, KMSError, KMSUnreachableError
from server.sealed.format import Recipient
from server.sealed.kms.base import DataKey, call_with_retries, wrong_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.sealed.kms.base import KeyContext

MECHANISM: Final = "openbao"
_TIMEOUT_S: Final = 5.0
# What OpenBao and Vault say when a key is there but may not be used any more.
_DISABLED_WORDS: Final = (
    "soft deleted",
    "soft-deleted",
    "minimum decryption version",
    "too old",
    "not found",
    "disabled",
)


class OpenBaoKMS:
    """One Transit key.

    The key must be made with `derived=true`: then the context goes into the key derivation, and it is sent as
    associated data besides.

    Args:
        mount: Path of the Transit engine.
        key: Name of the key.
        address: `https://…` of the server.
        token: Returns a fresh or cached token; called before every request, so that a short-lived one may be renewed.
        ca: PEM bundle that the server's certificate is checked against; None uses the system's.
        sleep: Waits between attempts.
    """

    mechanism = MECHANISM

    def __init__(
        self,
        mount: str,
        key: str,
        *,
        address: str,
        token: Callable[[hvac.Client], str],
        ca: Path | None = None,
        namespace: str | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        self._mount, self._key = mount, key
        self._token = token
        self._retry: dict[str, Any] = {} if sleep is None else {"sleep": sleep}
        self._client = hvac.Client(
            url=address,
            verify=str(ca) if ca is not None else True,
            timeout=_TIMEOUT_S,
            namespace=namespace,
            allow_redirects=False,
        )
        # Proxies of the environment must not see a data key.
        self._client.session.trust_env = False
        self.key_id = f"{mount}/{key}"

    def wrap(self, data_key: DataKey, context: KeyContext) -> Recipient:
        """Encrypt the data key with the Transit key."""
        answer = self._call(
            lambda transit: transit.encrypt_data(
                name=self._key,
                mount_point=self._mount,
                plaintext=base64.b64encode(data_key.reveal()).decode(),
                context=_encode(context),
                associated_data=_encode(context),
            )
        )
        return Recipient(MECHANISM, self.key_id, answer["data"]["ciphertext"].encode())

    def unwrap(self, recipient: Recipient, context: KeyContext) -> DataKey:
        """Decrypt what `wrap` made, whatever version of the key made it."""
        try:
            ciphertext = recipient.wrapped.decode("ascii")
        except UnicodeDecodeError as err:
            raise wrong_key("it is not a Transit ciphertext") from err
        answer = self._call(
            lambda transit: transit.decrypt_data(
                name=self._key,
                mount_point=self._mount,
                ciphertext=ciphertext,
                context=_encode(context),
                associated_data=_encode(context),
            )
        )
        try:
            return DataKey(base64.b64decode(answer["data"]["plaintext"], validate=True))
        except (binascii.Error, KeyError, TypeError) as err:
            raise wrong_key("the key service answered with something else") from err

    def _call(self, request: Callable[[Any], Any]) -> dict[str, Any]:
        return call_with_retries(lambda: self._attempt(request), **self._retry)

    def _attempt(self, request: Callable[[Any], Any]) -> dict[str, Any]:
        try:
            self._client.token = self._token(self._client)
            answer: dict[str, Any] = request(self._client.secrets.transit)
        except requests.exceptions.SSLError as err:
            raise KMSError(
                f"The TLS certificate of {self._client.url} is not trusted. Set STRONGROOM_OPENBAO_CA."
            ) from err
        except (requests.exceptions.RequestException, hvac.exceptions.VaultDown) as err:
            raise KMSUnreachableError(f"OpenBao at {self._client.url} does not answer ({type(err).__name__}).") from err
        except (hvac.exceptions.Forbidden, hvac.exceptions.Unauthorized) as err:
            raise KMSDeniedError(
                f"OpenBao refused the use of {self.key_id}: the token is revoked or its policy does not allow it. "
                f"'strongroom kms policy' prints the one it needs."
            ) from err
        except (hvac.exceptions.InternalServerError, hvac.exceptions.RateLimitExceeded) as err:
            raise KMSUnreachableError(f"OpenBao at {self._client.url} failed on its side.") from err
        except hvac.exceptions.VaultError as err:
            raise self._refusal(str(err).lower()) from err
        return answer

    def _refusal(self, message: str) -> KMSError:
        if any(words in message for words in _DISABLED_WORDS):
            return KMSDisabledError(f"The key {self.key_id} is disabled, retired or destroyed in OpenBao.")
        return wrong_key("wrong context, another key or a damaged wrapped key")


def from_environment(rest: str) -> OpenBaoKMS:
    """Return the service that `openbao:MOUNT/KEY` and the environment name.

    STRONGROOM_OPENBAO_ADDR is the address, STRONGROOM_OPENBAO_CA a PEM bundle; then either
    STRONGROOM_OPENBAO_TOKEN_FILE, or STRONGROOM_OPENBAO_ROLE_ID with STRONGROOM_OPENBAO_SECRET_ID_FILE (AppRole).

    Raises:
        ConfigError: Something is missing.
    """
    mount, _, key = rest.strip("/").rpartition("/")
    address = os.environ.get("STRONGROOM_OPENBAO_ADDR", "")
    if not mount or not key:
        raise ConfigError(f"The KMS URI 'openbao:{rest}' needs a mount and a key, as in openbao:transit/strongroom.")
    if not address.startswith("https://") and not address.startswith(("http://127.0.0.1:", "http://[::1]:")):
        raise ConfigError("STRONGROOM_OPENBAO_ADDR must be an https:// address (http:// on the loopback only).")
    ca = os.environ.get("STRONGROOM_OPENBAO_CA")
    return OpenBaoKMS(
        mount,
        key,
        address=address,
        token=token_from_environment(),
        ca=Path(ca) if ca else None,
        namespace=os.environ.get("STRONGROOM_OPENBAO_NAMESPACE"),
    )


def token_from_environment() -> Callable[[hvac.Client], str]:
    """Return how to get a token: from a file, read each time, or by AppRole.

    Raises:
        ConfigError: Neither is configured.
    """
    if token_file := os.environ.get("STRONGROOM_OPENBAO_TOKEN_FILE"):
        return lambda _client: _read_secret(Path(token_file))
    role_id = os.environ.get("STRONGROOM_OPENBAO_ROLE_ID")
    secret_file = os.environ.get("STRONGROOM_OPENBAO_SECRET_ID_FILE")
    if role_id and secret_file:
        return app_role(role_id, lambda: _read_secret(Path(secret_file)))
    raise ConfigError(
        "OpenBao needs STRONGROOM_OPENBAO_TOKEN_FILE, "
        "or STRONGROOM_OPENBAO_ROLE_ID and STRONGROOM_OPENBAO_SECRET_ID_FILE."
    )


def app_role(role_id: str, secret_id: Callable[[], str]) -> Callable[[hvac.Client], str]:
    """Log in by AppRole for every call: releases are rare, and no token lies about in between."""

    def login(client: hvac.Client) -> str:
        answer = client.auth.approle.login(role_id=role_id, secret_id=secret_id(), use_token=False)
        token: str = answer["auth"]["client_token"]
        return token

    return login


def _read_secret(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as err:
        raise ConfigError(f"The credential file {path} cannot be read: {err.strerror}.") from err


def _encode(context: KeyContext) -> str:
    return base64.b64encode(context.canonical()).decode()
