"""From a configured URI to the key service behind it; backends are imported when they are asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

from server.errors import ConfigError
from server.sealed.kms.local import LocalKMS

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.sealed.kms.base import KMS

PASSPHRASE_FILE_ENV: Final = "STRONGROOM_KMS_PASSPHRASE_FILE"  # noqa: S105 - a name


def open_kms(uri: str, *, passphrase: Callable[[], str] | None = None) -> KMS:
    """Return the key service that `uri` names. No secret is ever part of a URI.

    Args:
        uri: `file:PATH` for a local key file.
        passphrase: Asked where a local key file has one; by default the file that STRONGROOM_KMS_PASSPHRASE_FILE names.

    Raises:
        ConfigError: The URI is not understood.
        KMSError: The key service can't be used.
    """
    scheme, _, rest = uri.partition(":")
    if scheme == "file" and rest:
        return LocalKMS(Path(unquote(rest.removeprefix("//"))), passphrase=passphrase or _passphrase_from_file())
    raise ConfigError(f"The KMS URI {uri!r} is not understood. Expected file:PATH.")


def _passphrase_from_file() -> Callable[[], str] | None:
    path = os.environ.get(PASSPHRASE_FILE_ENV)
    if path is None:
        return None
    return lambda: Path(path).read_text().rstrip("\n")
