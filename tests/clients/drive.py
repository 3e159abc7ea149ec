"""Start one client against a gateway, and read from the recorded bytes what happened."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.clients.catalogue import Client, Target, environment

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a run of a client ended, and what was on the wire."""

    code: int | None
    out: str
    err: str
    seconds: float
    requests: bytes
    responses: bytes

    @property
    def statuses(self) -> list[int]:
        """The status lines of the answers to what was posted, by connection."""
        asked = re.findall(rb"(?:^|[\r\n}])([A-Z]{3,7}) /\S* HTTP/1\.1\r\n", self.requests)
        codes = re.findall(rb"(?:^|[\r\n}])HTTP/1\.1 (\d{3}) ", self.responses)
        return [int(code) for method, code in zip(asked, codes, strict=False) if method == b"POST"]

    @property
    def text(self) -> str:
        """Everything that the client printed."""
        return self.out + self.err


def run(client: Client, target: Target, prompt: str, *, limit_s: float = 120) -> Outcome:
    """Ask one question. A client that does not end within the limit is killed, and its code is None."""
    for folder in (target.home, target.work):
        folder.mkdir(parents=True, exist_ok=True)
    options, own = client.build(target, prompt)
    command = [str(client.program), *options]
    return run_offline(command, environment(target) | own, target.base, target.work, limit_s)


def run_offline(command: list[str], env: dict[str, str], base: str, work: Path, limit_s: float) -> Outcome:
    """Run a command where it reaches the gateway at `base` and nothing else; what passed is in `work/../wire`."""
    record = work.parent / "wire"
    record.mkdir()
    relay = [sys.executable, "-m", "tests.clients.offline", str(urlsplit(base).port), str(record), "--"]
    started_s = time.monotonic()
    process = subprocess.Popen(
        relay + command, cwd=work, env=env | {"PYTHONPATH": str(ROOT)}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip
    code: int | None = None
    try:
        out, err = process.communicate(timeout=limit_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends the client and all that the client started
        out, err = process.communicate()
    seconds = time.monotonic() - started_s

    def joined(kind: str) -> bytes:
        return b"\n".join(path.read_bytes() for path in sorted(record.glob(f"*.{kind}")))

    return Outcome(code, out, err, seconds, joined("request"), joined("response"))
