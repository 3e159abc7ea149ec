"""The lock: the digests of the templates that were reviewed, and the signature over them."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from server.template.source import Template

LOCK_FORMAT = 1
SIGNATURE_SUFFIX = ".sig"


def load_lock(
    path: Path, *, require_signature: bool = False, public_key: bytes | None = None
) -> dict[str, dict[str, str]]:
    """Return the locked digests by id and version.

    Raises:
        ConfigError: Missing, not canonical, or without a valid signature where one is demanded.
    """
    try:
        content = path.read_bytes()
    except OSError as err:
        raise ConfigError(f"The template lock {path} can't be read. Make it with 'strongroom template lock'.") from err
    if require_signature:
        verify_signature(content, path.with_name(path.name + SIGNATURE_SUFFIX), public_key)
    try:
        data = json.loads(content)
        lock: dict[str, dict[str, str]] = data["templates"]
        canonical = encode_lock(lock)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ConfigError(
            f"The template lock {path} can't be parsed. Make it again with 'strongroom template lock'."
        ) from err
    if data.get("format") != LOCK_FORMAT or content != canonical:
        raise ConfigError(
            f"The template lock {path} is not in canonical form. Make it again with 'strongroom template lock'."
        )
    return lock


def verify_signature(content: bytes, path: Path, public_key: bytes | None) -> None:
    """Check the Ed25519 signature of a lock.

    Raises:
        ConfigError: No key, no signature, or one that is not valid.
    """
    if public_key is None:
        raise ConfigError("Template signatures are demanded, but no public key is set. Set the templates' public key.")
    try:
        signature = base64.b64decode(path.read_bytes().strip(), validate=True)
    except OSError as err:
        raise ConfigError(
            f"The template lock is unsigned: {path} is missing. Sign it with 'strongroom template lock'."
        ) from err
    except (binascii.Error, ValueError) as err:
        raise ConfigError(f"{path} is not a signature.") from err
    try:
        key = load_pem_public_key(public_key) if public_key.startswith(b"-----") else None
        if key is not None and not isinstance(key, Ed25519PublicKey):
            raise ConfigError("The key that template locks are signed with must be an Ed25519 key.")
        (key or Ed25519PublicKey.from_public_bytes(public_key)).verify(signature, content)
    except (InvalidSignature, ValueError) as err:
        raise ConfigError(f"{path} is not a valid signature of the template lock by the key that is set.") from err


def encode_lock(templates: Mapping[str, Mapping[str, str]]) -> bytes:
    """Return the one way to write a lock down."""
    data = {"format": LOCK_FORMAT, "templates": {i: dict(sorted(v.items())) for i, v in sorted(templates.items())}}
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def digests(templates: Mapping[str, Mapping[str, Template]]) -> dict[str, dict[str, str]]:
    """Return what a lock of these templates holds."""
    return {name: {v: t.digest for v, t in versions.items()} for name, versions in templates.items()}


def verify_lock(templates: Mapping[str, Mapping[str, Template]], lock: Mapping[str, Mapping[str, str]]) -> None:
    """Check that files and lock agree both ways.

    Raises:
        ConfigError: A template is not locked, other than locked, or locked and gone; named.
    """
    for name, versions in templates.items():
        for version, template in versions.items():
            locked = lock.get(name, {}).get(version)
            if locked is None:
                raise ConfigError(
                    f"Template {name} {version} is not in the lock. Review it, then 'strongroom template lock'."
                )
            if locked != template.digest:
                raise ConfigError(
                    f"Template {name} {version} is not what was locked (digest {template.digest[:12]}, "
                    f"locked {locked[:12]}). Restore the file, or review it and lock it under a new version."
                )
    for name, locked_versions in lock.items():
        for version in locked_versions:
            if version not in templates.get(name, {}):
                raise ConfigError(f"Template {name} {version} is in the lock but its file is missing. Restore it.")
