"""TPM 2.0 of this machine: a secret sealed to PCR values (URI `tpm:sha256:7` or `tpm:sha256:0,2,7`)."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from typing import TYPE_CHECKING, Final

from tpm2_pytss import ESAPI, TCTILdr, TSS2_Exception
from tpm2_pytss.constants import ESYS_TR, TPM2_ALG, TPM2_SE, TPMA_OBJECT, TPMA_SESSION
from tpm2_pytss.types import (
    TPM2B_DIGEST,
    TPM2B_PRIVATE,
    TPM2B_PUBLIC,
    TPM2B_SENSITIVE_CREATE,
    TPML_PCR_SELECTION,
    TPMS_SENSITIVE_CREATE,
    TPMT_PUBLIC,
    TPMT_SYM_DEF,
)

from server.errors import ConfigError, KMSDeniedError, KMSError, KMSUnreachableError
from server.sealed.format import TAG_BYTES, Recipient
from server.sealed.kms.base import DATA_KEY_BYTES, DataKey, bind_to_context, unbind_from_context, wrong_key

if TYPE_CHECKING:
    from collections.abc import Generator

    from server.sealed.kms.base import KeyContext

MECHANISM: Final = "tpm"
TCTI_ENV: Final = "STRONGROOM_TPM_TCTI"
_DEFAULT_TCTI: Final = "device:/dev/tpmrm0"
_SELECTION: Final = re.compile(r"sha256:\d{1,2}(,\d{1,2})*\Z")
_BOUND_BYTES: Final = DATA_KEY_BYTES + TAG_BYTES
_LENGTH_BYTES: Final = 2
# Response codes, without the bits that say which handle or session they mean.
_RC_POLICY_FAIL: Final = 0x9D
_RC_INTEGRITY: Final = 0x9F
_RC_AUTH_FAIL: Final = 0x8E
_RC_FORMAT_ONE: Final = 0x80
_RC_FORMAT_ONE_MASK: Final = 0xBF
_RC_LOCKOUT: Final = 0x921
_LAYER_MASK: Final = 0xFF0000


class TPMKMS:
    """The machine's TPM under a PCR policy.

    The data key is bound to a random secret (see the specification, section 4); the secret is sealed in the TPM's
    storage hierarchy and comes out only while the selected PCRs are what they were when the model was sealed.

    Args:
        pcrs: `sha256:` and PCR numbers.
        tcti: How to reach the TPM; by default the kernel's resource manager.
    """

    mechanism = MECHANISM

    def __init__(self, pcrs: str, *, tcti: str = _DEFAULT_TCTI) -> None:
        if not _SELECTION.match(pcrs) or any(int(n) > 23 for n in pcrs.removeprefix("sha256:").split(",")):
            raise ConfigError(f"The KMS URI 'tpm:{pcrs}' must name PCRs 0 to 23, as in tpm:sha256:7.")
        self._pcrs = pcrs
        self._tcti = tcti
        with self._tpm() as tpm, _storage_key(tpm) as (_, name):
            # Which TPM it is: the name of its storage key, which only this chip can derive.
            self.key_id = f"{name[-16:].hex()}/{pcrs}"

    def wrap(self, data_key: DataKey, context: KeyContext) -> Recipient:
        """Seal a new secret under the PCR values of this moment and bind the data key to it."""
        secret = bytearray(secrets.token_bytes(DATA_KEY_BYTES))
        with self._tpm() as tpm, _storage_key(tpm) as (parent, _), self._policy(tpm, parent) as session:
            public = TPM2B_PUBLIC(
                publicArea=TPMT_PUBLIC(
                    type=TPM2_ALG.KEYEDHASH,
                    nameAlg=TPM2_ALG.SHA256,
                    objectAttributes=TPMA_OBJECT.FIXEDTPM | TPMA_OBJECT.FIXEDPARENT | TPMA_OBJECT.NODA,
                    authPolicy=TPM2B_DIGEST(bytes(tpm.policy_get_digest(session))),
                )
            )
            public.publicArea.parameters.keyedHashDetail.scheme.scheme = TPM2_ALG.NULL
            sensitive = TPM2B_SENSITIVE_CREATE(sensitive=TPMS_SENSITIVE_CREATE(data=bytes(secret)))
            with _session(tpm, parent, TPM2_SE.HMAC, TPMA_SESSION.DECRYPT) as transport:
                private, public, _, _, _ = tpm.create(parent, sensitive, public, session2=transport)
        parts = (private.marshal(), public.marshal())
        bound = bind_to_context(secret, data_key, context)
        secret[:] = bytes(len(secret))
        wrapped = b"".join(len(p).to_bytes(_LENGTH_BYTES, "big") + p for p in parts) + bound
        return Recipient(MECHANISM, self.key_id, wrapped)

    def unwrap(self, recipient: Recipient, context: KeyContext) -> DataKey:
        """Have the TPM release the secret, if the PCRs still agree, and open the data key with it."""
        private_bytes, rest = _take(recipient.wrapped)
        public_bytes, bound = _take(rest)
        if len(bound) != _BOUND_BYTES:
            raise wrong_key("it is not a blob of this machine's TPM")
        with self._tpm() as tpm, _storage_key(tpm) as (parent, _):
            try:
                private, _ = TPM2B_PRIVATE.unmarshal(private_bytes)
                public, _ = TPM2B_PUBLIC.unmarshal(public_bytes)
                item = tpm.load(parent, private, public)
            except TSS2_Exception as err:
                raise wrong_key("it is not a blob of this machine's TPM, or damaged") from err
            try:
                with self._policy(tpm, parent) as session:
                    secret = bytearray(bytes(tpm.unseal(item, session1=session)))
            finally:
                tpm.flush_context(item)
        try:
            return unbind_from_context(secret, bound, context)
        finally:
            secret[:] = bytes(len(secret))

    @contextlib.contextmanager
    def _tpm(self) -> Generator[ESAPI]:
        name, _, conf = self._tcti.partition(":")
        try:
            with TCTILdr(name, conf or None) as tcti, ESAPI(tcti) as tpm:
                yield tpm
        except TSS2_Exception as err:
            raise _translate(err, self._pcrs) from err

    @contextlib.contextmanager
    def _policy(self, tpm: ESAPI, parent: ESYS_TR) -> Generator[ESYS_TR]:
        with _session(tpm, parent, TPM2_SE.POLICY, TPMA_SESSION.ENCRYPT) as session:
            tpm.policy_pcr(session, None, TPML_PCR_SELECTION.parse(self._pcrs))
            yield session


@contextlib.contextmanager
def _storage_key(tpm: ESAPI) -> Generator[tuple[ESYS_TR, bytes]]:
    """The storage primary key: derived from the owner seed with fixed parameters, the same each time."""
    handle, public, _, _, _ = tpm.create_primary(None, "ecc256")
    try:
        yield handle, bytes(public.get_name())
    finally:
        tpm.flush_context(handle)


@contextlib.contextmanager
def _session(tpm: ESAPI, parent: ESYS_TR, kind: TPM2_SE, direction: TPMA_SESSION) -> Generator[ESYS_TR]:
    """A session salted to the TPM's own key: the secret crosses the bus to the chip encrypted."""
    session = tpm.start_auth_session(parent, ESYS_TR.NONE, kind, TPMT_SYM_DEF.parse("aes128cfb"), TPM2_ALG.SHA256)
    try:
        tpm.trsess_set_attributes(session, TPMA_SESSION.CONTINUESESSION | direction)
        yield session
    finally:
        tpm.flush_context(session)


def _take(data: bytes) -> tuple[bytes, bytes]:
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
    return data[_LENGTH_BYTES:end], data[end:]


def _translate(err: TSS2_Exception, pcrs: str) -> KMSError:
    code = err.rc & 0xFFFF
    if err.rc & _LAYER_MASK:
        return KMSUnreachableError(f"The TPM does not answer (0x{err.rc:x}). Check the device or {TCTI_ENV}.")
    if code & _RC_FORMAT_ONE and code & _RC_FORMAT_ONE_MASK == _RC_POLICY_FAIL:
        return KMSDeniedError(
            f"The TPM refused: {pcrs} are not what they were when the model was sealed. If the machine was updated on "
            f"purpose, rewrap the model with another key service."
        )
    if code == _RC_LOCKOUT or code & _RC_FORMAT_ONE_MASK == _RC_AUTH_FAIL:
        return KMSDeniedError(f"The TPM is locked out or its hierarchy has a password (0x{code:x}).")
    if code & _RC_FORMAT_ONE_MASK == _RC_INTEGRITY:
        return wrong_key("it is not a blob of this machine's TPM, or damaged")
    return KMSError(f"The TPM refused with 0x{code:x}.")


def from_environment(pcrs: str) -> TPMKMS:
    """Return the TPM that `tpm:PCRS` and STRONGROOM_TPM_TCTI name."""
    return TPMKMS(pcrs, tcti=os.environ.get(TCTI_ENV, _DEFAULT_TCTI))
