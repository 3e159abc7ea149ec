"""OpenSSF's own model-signing accepts what we sign, refuses it once altered, and we accept what it signs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from server.sealed.model import open_sealed
from server.sealed.signature import LocalSigner, TrustedSigner, create_signing_key, public_path
from tests.unit.sealed.workshop import Workshop, open_workshop

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return open_workshop(tmp_path)


def model_signing(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "model_signing", *map(str, args)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda c: c.name)
def test_their_verifier_accepts_our_signature(workshop: Workshop, curve: ec.EllipticCurve) -> None:
    signer = LocalSigner(ec.generate_private_key(curve))
    path = workshop.seal(signer=signer, seal_files=curve.name == "secp384r1")
    public = workshop.folder / "signer.pub"
    public.write_bytes(
        signer.public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    arguments = ("verify", "key", path, "--signature", path / "model.sig", "--public_key", public)
    verified = model_signing(*arguments)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    if curve.name != "secp256r1":
        return  # each of their starts takes two seconds
    # Rotation touches neither payload nor signature.
    (path / "recipients.json").write_text("{}")
    assert model_signing(*arguments).returncode == 0
    shard = path / "model-00001-of-00002.sealed"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    assert model_signing(*arguments).returncode != 0


def test_a_signature_under_another_key_is_refused_by_both(workshop: Workshop) -> None:
    path = workshop.seal()
    create_signing_key(workshop.folder / "other.pem")
    public = public_path(workshop.folder / "other.pem")
    assert (
        model_signing("verify", "key", path, "--signature", path / "model.sig", "--public_key", public).returncode != 0
    )
    model = open_sealed(path, trusted_signers=[TrustedSigner.load(public)], allow_unsigned=True)
    assert model.signer is None
    shutil.rmtree(path)
