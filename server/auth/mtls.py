"""Client certificates to principals, with revocation by a file of fingerprints."""

from __future__ import annotations

import hashlib
import logging
import re
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from server.auth.names import parse_name
from server.errors import AuthenticationError, ConfigError
from server.types import Principal, SubjectId, TenantId

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger("strongroom.auth")

MAX_REMEMBERED = 4096
MAX_FILE_BYTES = 1 << 22
_FINGERPRINT = re.compile(r"[0-9a-f]{64}", re.ASCII)
CHECK_FILE_S = 1.0


@dataclass(frozen=True, slots=True)
class CertificateRules:
    """How a certificate's subject becomes a principal: CN is the subject, O the tenant, each OU a group.

    Attributes:
        default_tenant: For certificates without an O; None refuses them.
        scopes: What every certificate may be used for at most.
    """

    default_tenant: str | None = None
    scopes: frozenset[str] = frozenset({"model:*"})


class CertificateMap:
    """Implements `authenticator.CertificateVerifier`. TLS has verified the chain; this says who it is.

    Args:
        rules: How names become a principal.
        revoked: A file with the SHA-256 of each revoked certificate's DER in hex, one a line, `#` for comments. It is
            read again within a second of a change. A file that can't be read any more, or has a line that is none,
            takes nothing back: what was revoked stays so, what it names besides is revoked too, and the log says so.
        clock: Seconds since the epoch.

    Raises:
        ConfigError: The file can't be read or is damaged.
    """

    def __init__(
        self, rules: CertificateRules, *, revoked: Path | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self._rules = rules
        self._path = revoked
        self._clock = clock
        self._known: OrderedDict[str, Principal] = OrderedDict()
        self._revoked: frozenset[str] = frozenset()
        self._stamp: tuple[int, int] | None = None
        self._checked_at_s = -CHECK_FILE_S
        if revoked is not None:
            self._stamp = _stamp(revoked)  # before it is read: what changes in between is read again
            self._revoked, num_bad = _read(revoked)
            if num_bad:
                raise ConfigError(f"{revoked}: every line must be the SHA-256 of a certificate as 64 hex digits.")

    def authenticate(self, certificate: bytes) -> Principal:
        """Map a certificate that TLS has verified to a principal.

        Raises:
            AuthenticationError: It is revoked, expired, made for servers, or names nobody that can be used.
        """
        fingerprint = hashlib.sha256(certificate).hexdigest()
        if fingerprint in self._load():
            raise AuthenticationError("revoked certificate", key_id=fingerprint[:16])
        principal = self._known.get(fingerprint)
        if principal is None:
            principal = self._parse(certificate, fingerprint)
            self._known[fingerprint] = principal
            if len(self._known) > MAX_REMEMBERED:
                self._known.popitem(last=False)
        if principal.expires_at_s is not None and self._clock() >= principal.expires_at_s:
            raise AuthenticationError("expired certificate", key_id=fingerprint[:16])
        return principal

    def is_revoked(self, credential_id: str) -> bool:
        """Whether the certificate was revoked since."""
        return credential_id.removeprefix("mtls:") in self._load()

    def _parse(self, certificate: bytes, fingerprint: str) -> Principal:
        try:
            parsed = x509.load_der_x509_certificate(certificate)
            name, usages = parsed.subject, _usages(parsed)
        except (ValueError, x509.DuplicateExtension) as error:
            raise AuthenticationError("certificate not readable") from error
        if usages is not None and ExtendedKeyUsageOID.CLIENT_AUTH not in usages:
            raise AuthenticationError("certificate is not for clients", key_id=fingerprint[:16])
        organisations = _values(name, NameOID.ORGANIZATION_NAME) or [self._rules.default_tenant or ""]
        common = _values(name, NameOID.COMMON_NAME)
        if len(common) != 1 or len(organisations) != 1:
            raise AuthenticationError("certificate needs one CN and one O", key_id=fingerprint[:16])
        try:
            subject, tenant = parse_name(common[0], "subject"), parse_name(organisations[0], "tenant")
            groups = frozenset(parse_name(one, "group") for one in _values(name, NameOID.ORGANIZATIONAL_UNIT_NAME))
        except ValueError as error:
            raise AuthenticationError("certificate names that can't be used", key_id=fingerprint[:16]) from error
        return Principal(
            SubjectId(subject),
            TenantId(tenant),
            groups,
            self._rules.scopes,
            "mtls",
            f"mtls:{fingerprint}",
            parsed.not_valid_after_utc.timestamp(),
        )

    def _load(self) -> frozenset[str]:
        if self._path is None or self._clock() - self._checked_at_s < CHECK_FILE_S:
            return self._revoked
        self._checked_at_s = self._clock()
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return self._revoked
            revoked, num_bad = _read(self._path)
        except ConfigError as err:  # gone, perhaps for a moment: the next look comes in a second
            if self._stamp is not None:
                self._stamp = None
                log.error("what was revoked stays so, but nothing new is: %s", err)  # noqa: TRY400 - it says all
            return self._revoked
        if num_bad:
            log.error(
                "lines of the file of revoked certificates are no SHA-256 in 64 hex digits; the others hold, and "
                "what was revoked before stays so",
                extra={"file": str(self._path), "bad_lines": num_bad},
            )
            revoked |= self._revoked
        self._revoked, self._stamp = revoked, stamp
        return self._revoked


def _values(name: x509.Name, oid: x509.ObjectIdentifier) -> list[str]:
    return [str(attribute.value) for attribute in name.get_attributes_for_oid(oid)]


def _usages(certificate: x509.Certificate) -> list[x509.ObjectIdentifier] | None:
    try:
        found = certificate.extensions.get_extension_for_oid(ExtensionOID.EXTENDED_KEY_USAGE).value
    except x509.ExtensionNotFound:
        return None
    return list(found) if isinstance(found, x509.ExtendedKeyUsage) else []


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"The file of revoked certificates {path} can't be read ({error.strerror}).") from error
    return found.st_mtime_ns, found.st_size


def _read(path: Path) -> tuple[frozenset[str], int]:
    """Return the fingerprints in a file, and how many lines are none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The file of revoked certificates {path} can't be read ({error.strerror}).") from error
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"The file of revoked certificates {path} is larger than {MAX_FILE_BYTES} bytes.")
    lines = content.decode("utf-8-sig", errors="replace").splitlines()  # some editors begin a file with such a mark
    prints = {line.split("#")[0].strip().replace(":", "").lower() for line in lines} - {""}
    good = frozenset(one for one in prints if _FINGERPRINT.fullmatch(one))
    return good, len(prints) - len(good)
