"""From a configured URI to the key service behind it; backends are imported when they are asked for."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast
from urllib.parse import unquote

from server.errors import ConfigError
from server.sealed.kms.local import LocalKMS

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.sealed.kms.base import KMS

PASSPHRASE_FILE_ENV: Final = "STRONGROOM_KMS_PASSPHRASE_FILE"  # noqa: S105 - a name

_BACKENDS: Final = {"openbao": "openbao", "pkcs11": "pkcs11", "aws": "aws", "tpm": "tpm"}


def open_kms(uri: str, *, passphrase: Callable[[], str] | None = None) -> KMS:
    """Return the key service that `uri` names. No secret is ever part of a URI.

    Args:
        uri: `file:PATH`, `openbao:MOUNT/KEY`, `pkcs11:token=T;object=K`, `aws:KEY-ARN` or `tpm:sha256:PCRS`.
        passphrase: Asked where a local key file has one; by default the file that STRONGROOM_KMS_PASSPHRASE_FILE names.

    Raises:
        ConfigError: The URI is not understood.
        KMSError: The key service can't be used.
    """
    scheme, _, rest = uri.partition(":")
    if scheme == "file" and rest:
        return LocalKMS(Path(unquote(rest.removeprefix("//"))), passphrase=passphrase or _passphrase_from_file())
    if scheme in _BACKENDS and rest:
        try:
            backend = importlib.import_module(f"server.sealed.kms.{_BACKENDS[scheme]}")
        except ImportError as err:
            raise ConfigError(
                f"The KMS URI {uri!r} needs the extra 'kms-{scheme}': pip install 'strongroom[kms-{scheme}]' ({err})."
            ) from err
        return cast("KMS", backend.from_environment(rest))
    raise ConfigError(
        f"The KMS URI {uri!r} is not understood. Expected file:PATH, openbao:MOUNT/KEY, pkcs11:token=T;object=K, "
        f"aws:KEY-ARN or tpm:sha256:PCRS."
    )


def _passphrase_from_file() -> Callable[[], str] | None:
    path = os.environ.get(PASSPHRASE_FILE_ENV)
    if path is None:
        return None
    return lambda: Path(path).read_text().rstrip("\n")
