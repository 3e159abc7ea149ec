"""A PKCS#11 HSM (SoftHSM2): release, wrong PIN, key destroyed, token gone, extractable key; signing on the token."""

# apt: softhsm2 softhsm2-common

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, Mechanism
from pkcs11.util.ec import encode_named_curve_parameters

from server.errors import ConfigError, KMSDeniedError, KMSDisabledError, KMSUnreachableError
from server.sealed.kms.base import DataKey
from server.sealed.kms.pkcs11 import PKCS11KMS, PKCS11Signer
from server.sealed.kms.uri import open_kms
from server.sealed.model import open_sealed
from server.sealed.signature import TrustedSigner
from tests.integration.kms_contract import CONTEXT, Starts, check_round_trip

MODULE = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN, SO_PIN, LABEL = "5678", "1234", "strongroom"


@dataclass
class Token:
    """A token of its own for every test; SoftHSM keeps it in a folder."""

    label: str
    folder: Path

    def kms(self, pin: str = PIN, label: str = LABEL) -> PKCS11KMS:
        return PKCS11KMS(MODULE, self.label, label, pin=lambda: pin)

    def session(self) -> pkcs11.Session:
        library = pkcs11.lib(str(MODULE))
        library.reinitialize()
        return library.get_token(token_label=self.label).open(rw=True, user_pin=PIN)

    def new_key(self, label: str = LABEL, *, extractable: bool = False) -> None:
        template = {Attribute.EXTRACTABLE: extractable, Attribute.SENSITIVE: not extractable}
        with self.session() as session:
            session.generate_key(KeyType.AES, 256, label=label, store=True, template=template)

    def destroy_key(self, label: str = LABEL) -> None:
        with self.session() as session:
            session.get_key(label=label).destroy()


@pytest.fixture
def token(softhsm: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Token:
    monkeypatch.setenv("SOFTHSM2_CONF", str(softhsm / "softhsm2.conf"))
    label = request.node.name[:32]
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", SO_PIN, "--pin", PIN],
        check=True, capture_output=True,
    )  # fmt: skip
    token = Token(label, softhsm)
    token.new_key()
    return token


def test_round_trip(token: Token, tmp_path: Path) -> None:
    check_round_trip(token.kms())
    starts = Starts(tmp_path, token.kms())
    starts.released()
    starts.rewrapped_from_file_and_back()


def test_uri_and_environment(token: Token, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pin").write_text(PIN + "\n")
    monkeypatch.setenv("STRONGROOM_PKCS11_MODULE", str(MODULE))
    monkeypatch.setenv("STRONGROOM_PKCS11_PIN_FILE", str(tmp_path / "pin"))
    check_round_trip(open_kms(f"pkcs11:token={token.label};object={LABEL}"))
    with pytest.raises(ConfigError, match="no more"):
        open_kms(f"pkcs11:token={token.label};object={LABEL};pin-value=5678")


def test_wrong_pin(token: Token, tmp_path: Path) -> None:
    starts = Starts(tmp_path, token.kms())
    starts.refused(KMSDeniedError, kms=token.kms(pin="0000"))


def test_destroyed_key_and_another_of_its_name(token: Token, tmp_path: Path) -> None:
    starts = Starts(tmp_path, token.kms())
    token.destroy_key()
    starts.refused(KMSDisabledError)
    token.new_key()
    starts.refused(KMSDeniedError)


def test_token_taken_out(token: Token, tmp_path: Path) -> None:
    starts = Starts(tmp_path, token.kms())
    starts.released()
    (token.folder / "tokens").rename(token.folder / "aside")
    (token.folder / "tokens").mkdir()
    try:
        starts.refused(KMSUnreachableError)
    finally:
        (token.folder / "tokens").rmdir()
        (token.folder / "aside").rename(token.folder / "tokens")
    starts.released()


def test_a_key_that_may_leave_is_refused(token: Token) -> None:
    token.new_key("loose", extractable=True)
    with pytest.raises(KMSDeniedError, match="may leave"):
        token.kms(label="loose").wrap(DataKey(bytes(32)), CONTEXT)


def test_missing_module() -> None:
    kms = PKCS11KMS(Path("/nonexistent/hsm.so"), "t", "k", pin=lambda: PIN)
    with pytest.raises(KMSUnreachableError):
        kms.wrap(DataKey(bytes(32)), CONTEXT)


@pytest.mark.parametrize("curve", ["secp256r1", "secp384r1"])
def test_signing_on_the_token(token: Token, tmp_path: Path, curve: str) -> None:
    with token.session() as session:
        parameters = session.create_domain_parameters(
            KeyType.EC, {Attribute.EC_PARAMS: encode_named_curve_parameters(curve)}, local=True
        )
        parameters.generate_keypair(mechanism=Mechanism.EC_KEY_PAIR_GEN, store=True, label="signer")
    signer = PKCS11Signer(MODULE, token.label, "signer", pin=lambda: PIN)
    starts = Starts(tmp_path, token.kms())
    path = starts.workshop.seal("signed", signer=signer)
    trusted = TrustedSigner.of(signer.public_key)
    assert open_sealed(path, trusted_signers=[trusted]).signer == trusted.id
