"""The log's key on a PKCS#11 token (SoftHSM2): signing, a token that goes away and comes back, keys that won't do."""

# apt: softhsm2 softhsm2-common

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pkcs11
import pytest
from pkcs11 import Attribute, KeyType, Mechanism, ObjectClass
from pkcs11.util.ec import encode_named_curve_parameters

from benchmarks.gateway.kit import MODEL, wait_until
from server.audit.checkpoint import ED25519, VerifierKey, new_audit_key, verify_note
from server.audit.client import SyncAuditClient
from server.audit.entry import new_entry
from server.audit.log import AuditLog
from server.audit.tags import Event
from server.audit.token import TokenSigner, open_token
from server.audit.verify import Verifier
from server.errors import AuditLogError, AuditUnavailableError, ConfigError, KMSDeniedError, KMSError
from tests.unit.audit.audit_kit import ORIGIN, start_writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MODULE = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN, SO_PIN, LABEL = "5678", "1234", "audit"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@dataclass
class Token:
    """A token of its own for every test, in SoftHSM's folder; `take_out` and `put_back` move the folder."""

    label: str
    folder: Path
    opened: TokenSigner | None = None

    @property
    def uri(self) -> str:
        return f"pkcs11:token={self.label};object={LABEL}"

    def signer(self, pin: Callable[[], str] = lambda: PIN, label: str = LABEL) -> TokenSigner:
        self.close()  # a new signer starts the library anew, which ends the sessions of the one before
        self.opened = TokenSigner(ORIGIN, MODULE, self.label, label, pin=pin)
        return self.opened

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()

    def new_key(self, label: str = LABEL, curve: str = "1.3.101.112", *, extractable: bool = False) -> None:
        self.close()
        library = pkcs11.lib(str(MODULE))
        library.reinitialize()
        with library.get_token(token_label=self.label).open(rw=True, user_pin=PIN) as session:
            parameters = session.create_domain_parameters(
                KeyType.EC_EDWARDS, {Attribute.EC_PARAMS: encode_named_curve_parameters(curve)}, local=True
            )
            template = {Attribute.EXTRACTABLE: extractable, Attribute.SENSITIVE: not extractable}
            parameters.generate_keypair(
                mechanism=Mechanism.EC_EDWARDS_KEY_PAIR_GEN, store=True, label=label, private_template=template
            )

    def take_out(self) -> None:
        (self.folder / "tokens").rename(self.folder / "aside")
        (self.folder / "tokens").mkdir()

    def put_back(self) -> None:
        (self.folder / "tokens").rmdir()
        (self.folder / "aside").rename(self.folder / "tokens")


@pytest.fixture
def token(
    softhsm: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Token]:
    monkeypatch.setenv("SOFTHSM2_CONF", str(softhsm / "softhsm2.conf"))
    (tmp_path / "pin").write_text(f"{PIN}\n")
    monkeypatch.setenv("STRONGROOM_PKCS11_MODULE", str(MODULE))
    monkeypatch.setenv("STRONGROOM_PKCS11_PIN_FILE", str(tmp_path / "pin"))
    label = request.node.name[5:37]
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", label, "--so-pin", SO_PIN, "--pin", PIN],
        check=True, capture_output=True,
    )  # fmt: skip
    token = Token(label, softhsm)
    token.new_key()
    yield token
    token.close()


def test_what_the_token_signs_any_verifier_accepts(token: Token, tmp_path: Path) -> None:
    signer = token.signer()
    log = AuditLog(tmp_path / "audit", signer)
    entry = b'{"event":"admin:act:performed","time":"2026-11-22T21:00:00.000000Z","v":1}'
    log.commit(len(entry).to_bytes(2, "big") + entry, [entry])
    log.close()
    assert Verifier(tmp_path / "audit", key=signer.key).verify().size == 1
    verify_note((tmp_path / "audit/checkpoint").read_text(), signer.key)


def test_a_writer_stops_while_the_token_is_out_and_goes_on_when_it_is_back(token: Token, tmp_path: Path) -> None:
    def act(number: int) -> dict[str, object]:
        return new_entry(Event.ACT_PERFORMED, number=number)

    process = start_writer(tmp_path, token.uri, "--origin", ORIGIN)
    try:
        client = SyncAuditClient(tmp_path / "audit.sock")
        assert client.append(act(0)) == 1
        token.take_out()
        for _ in range(3):
            with pytest.raises(AuditUnavailableError, match="signing key"):
                client.append(act(-1))
        assert "can't be written" in (tmp_path / "writer.log").read_text()
        token.put_back()

        def works() -> bool:
            try:
                return client.append(act(1)) > 0
            except AuditUnavailableError:
                return False

        wait_until(works)
        client.close()
    finally:
        process.terminate()
        assert process.wait(20) == 0
    key = VerifierKey.parse((tmp_path / "audit/vkey").read_text())
    assert (key.name, key) == (ORIGIN, token.signer().key)
    events = Verifier(tmp_path / "audit", key=key).verify().events
    assert (events["admin:act:performed"], events["audit:log:interrupted"]) == (2, 1)
    new_audit_key(tmp_path / "another.key", name=ORIGIN)
    process = start_writer(tmp_path, tmp_path / "another.key", wait=False)
    assert process.wait(20) == 1  # a file's key can't go on with this log
    assert "another key" in (tmp_path / "writer.log").read_text()


def test_requests_while_the_token_is_out(token: Token, make_gateway) -> None:
    kit = make_gateway(audit={"key": token.uri})
    kit.start()
    assert not (kit.settings.keys_dir / "audit.key").exists()
    api_key = kit.new_key(groups={"developers"})
    kit.wait_for_key(api_key)
    headers = {"authorization": f"Bearer {api_key}"}
    url = kit.base + "/v1/chat/completions"
    operator = {"authorization": f"Bearer {kit.new_key(groups={'operators'}, subject='operator')}"}

    def metrics() -> str:
        return httpx.get(kit.admin + "/metrics", headers=operator).text

    wait_until(lambda: "strongroom_audit_writable 1.0" in metrics())
    assert httpx.post(url, json=CHAT, headers=headers).status_code == 200
    kit.control(delay_ms=20, num_tokens=60)
    lines = []
    with httpx.stream("POST", url, json={**CHAT, "stream": True}, headers=headers, timeout=20) as response:
        for line in response.iter_lines():
            lines.append(line)
            if len(lines) == 10:
                token.take_out()
                refused = httpx.post(url, json=CHAT, headers=headers)
                assert (refused.status_code, refused.json()["error"]["code"]) == (503, "audit_unavailable")
                assert "strongroom_audit_writable 0.0" in metrics()
    events = [line[6:] for line in lines if line.startswith("data: ")]
    assert json.loads(events[-1])["error"]["code"] == "audit_unavailable"
    assert not any('"finish_reason":"stop"' in event for event in events)
    finished = kit.stats()["finished"]
    token.put_back()
    kit.control()
    wait_until(lambda: httpx.post(url, json=CHAT, headers=headers).status_code == 200)
    assert "strongroom_audit_writable 1.0" in metrics()
    assert kit.stats()["finished"] == finished + 1  # what was refused reached no engine
    kit.stop()
    key = VerifierKey(kit.settings.audit.origin, ED25519, token.signer().key.public_key)
    report = Verifier(kit.settings.audit_dir, key=key).verify()
    assert (report.num_open, report.num_accepted) == (0, report.num_finished)


def test_a_refused_pin_is_not_tried_until_the_token_locks(token: Token) -> None:
    pin = [PIN]
    signer = token.signer(lambda: pin[0])
    signer.close()
    pin[0] = "0000"
    for _ in range(20):
        with pytest.raises(OSError, match="PIN"):
            signer.sign(b"x")
    pin[0] = PIN
    assert len(signer.sign(b"x")) == 64


def test_a_key_that_will_not_do_is_refused_at_start(token: Token, tmp_path: Path) -> None:
    token.new_key("loose", extractable=True)
    with pytest.raises(KMSDeniedError, match="may leave"):
        token.signer(label="loose")
    with pytest.raises(KMSError, match="no Ed25519 key pair"):
        token.signer(label="missing")
    with pytest.raises(ConfigError, match="origin"):
        open_token(token.uri, name=None)
    with pytest.raises(ConfigError, match="spaces"):
        open_token(token.uri, name="a b")
    process = start_writer(tmp_path, f"pkcs11:token={token.label};object=missing", "--origin", ORIGIN, wait=False)
    assert process.wait(20) == 1
    assert "no Ed25519 key pair" in (tmp_path / "writer.log").read_text()
    token.new_key("other")
    AuditLog(tmp_path / "audit", token.signer()).close()
    with pytest.raises(AuditLogError, match="another key"):
        AuditLog(tmp_path / "audit", token.signer(label="other"))


def test_another_key_under_the_label_does_not_sign(token: Token) -> None:
    signer = token.signer()
    token.close()
    library = pkcs11.lib(str(MODULE))
    library.reinitialize()
    with library.get_token(token_label=token.label).open(rw=True, user_pin=PIN) as session:
        for kind in (ObjectClass.PUBLIC_KEY, ObjectClass.PRIVATE_KEY):
            session.get_key(kind, KeyType.EC_EDWARDS, LABEL).destroy()
    token.new_key()
    with pytest.raises(OSError, match="not the one"):
        signer.sign(b"x")
