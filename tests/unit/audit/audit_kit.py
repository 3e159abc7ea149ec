"""Makes logs, writers and values for the audit tests."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from server.audit.checkpoint import FileSigner, VerifierKey, new_audit_key
from server.audit.client import wait_for_writer
from server.audit.entry import encode_entry
from server.audit.log import AuditLog
from server.audit.tiles import pack_entries
from server.types import (
    Client,
    Decision,
    ModelRequest,
    Obligations,
    Principal,
    Prompt,
    ScanReport,
    ScanState,
    SubjectId,
    TemplateRef,
    TenantId,
    WireFormat,
)
from server.types import Completion as CompletionPayload

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[3]
ORIGIN = "audit.test/log"
CLIENT = Client(address="192.0.2.7", user_agent="probe/1")
PRINCIPAL = Principal(
    subject=SubjectId("alice"),
    tenant=TenantId("blue"),
    groups=frozenset({"dev"}),
    scopes=frozenset({"model:chat:create"}),
    method="api_key",
    credential_id="k1",
)
DECISION = Decision(
    allowed=True,
    reason="permit",
    policies=("p0",),
    policy_digest="ab" * 32,
    obligations=Obligations(templates=("secure-coding",)),
)
REQUEST = ModelRequest(
    wire_format=WireFormat.CHAT, model="smol", payload=CompletionPayload("a prompt nobody may keep"), sampling={}
)
PROMPT = Prompt(
    text="a prompt nobody may keep", token_ids=[1, 2, 3], template=TemplateRef("secure-coding", "1.0.0", "cd" * 32)
)
CLEAN = ScanReport(ScanState.CLEAN)
EFFECTIVE = {
    "model": "smol",
    "model_digest": "ef" * 32,
    "stage": "live",
    "max_tokens": 9,
    "params": {"temperature": 0.7},
}


def new_signer(seed: str = "log", name: str = ORIGIN) -> FileSigner:
    return FileSigner(name, Ed25519PrivateKey.from_private_bytes(sha256(seed.encode()).digest()))


def event(event_name: str, number: int, **fields: Any) -> bytes:
    return encode_entry(
        {"v": 1, "event": event_name, "time": "2026-11-22T21:00:00.000000Z", "number": number, **fields}
    )


def request_pair(number: int, **fields: Any) -> list[bytes]:
    request_id = f"req-{number:08d}"
    return [
        event("gateway:request:accepted", number, request_id=request_id, **fields),
        event("gateway:request:finished", number, request_id=request_id, outcome="completed"),
    ]


def fill(log: AuditLog, num_entries: int, *, group: int = 7, **fields: Any) -> None:
    """Append requests in groups; an odd rest is an act of administration."""
    entries = [entry for number in range(num_entries // 2) for entry in request_pair(number, **fields)]
    entries += [event("admin:act:performed", num_entries)] * (num_entries % 2)
    for start in range(0, len(entries), group):
        part = entries[start : start + group]
        log.commit(pack_entries(part), part)
        log.publish()


def make_log(
    directory: Path, num_entries: int, *, segment_bytes: int = 1 << 26, group: int = 7, seal: bool = False
) -> VerifierKey:
    """Write a whole log and return its public key."""
    signer = new_signer()
    log = AuditLog(directory, signer, segment_bytes=segment_bytes)
    entries = [entry for number in range(num_entries // 2) for entry in request_pair(number)]
    entries += [event("admin:act:performed", num_entries)] * (num_entries % 2)
    for start in range(0, len(entries), group):
        part = entries[start : start + group]
        if log.is_segment_full:
            digest = log.rotate()
            if seal:
                part = [event("audit:segment:opened", start, open=[], previous_sha256=digest), *part]
        log.commit(pack_entries(part), part)
    log.close()
    return signer.key


@contextmanager
def writer_process(state: Path, *options: str, key: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a real writer over `state/audit` at `state/audit.sock`."""
    key = key or state / "audit.key"
    if not key.exists():
        new_audit_key(key, name=ORIGIN)
    process = start_writer(state, key, *options)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(20)


def start_writer(state: Path, key: Path | str, *options: str, wait: bool = True) -> subprocess.Popen[bytes]:
    with (state / "writer.log").open("ab") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "server.audit.writer",
                "--dir",
                str(state / "audit"),
                "--key",
                str(key),
                "--socket",
                str(state / "audit.sock"),
                *options,
            ],
            cwd=ROOT,
            stderr=log,
        )
    if wait:
        wait_for_writer(state / "audit.sock", deadline_s=20)
    return process


def read_vkey(state: Path) -> VerifierKey:
    return VerifierKey.parse((state / "audit.key.vkey").read_text())


def wait_until(condition: Any, *, deadline_s: float = 10.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true in time"
        time.sleep(0.02)
