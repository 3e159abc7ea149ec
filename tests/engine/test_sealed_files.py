"""Attacks W1, W7: with config and tokenizer sealed too, real vLLM reads them in memory; no disk holds them."""

import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from server.bootstrap import KMS_KEY, SIGNING_KEY
from server.sealed.agent import KeyAgent
from server.sealed.embedded import MODEL_ID
from server.sealed.envelope import unwrap_from_any
from server.sealed.kms.base import KeyContext
from server.sealed.kms.local import LocalKMS, create_key_file
from server.sealed.memory import is_tmpfs
from server.sealed.model import open_sealed
from server.sealed.signature import TrustedSigner, create_signing_key, public_path
from server.sealed.stage import staging_folder
from tests.engine.test_serve import ROOT, Served, cmdline

pytestmark = pytest.mark.timeout(900)
SEAL = """
import sys
from pathlib import Path
from server.sealed.embedded import MODEL_ID, load_embedded
from server.sealed.kms.local import LocalKMS
from server.sealed.seal import seal_model
from server.sealed.signature import LocalSigner
kms, pem, out = map(Path, sys.argv[1:])
seal_model(load_embedded(), out, model_id=MODEL_ID, version=1, services=[LocalKMS(kms)],
           signer=LocalSigner.load(pem), seal_files=True)
"""


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder whose only model has its files sealed."""
    state = tmp_path_factory.mktemp("files") / "state"
    for folder in (state, state / "keys", state / "models"):
        folder.mkdir(mode=0o700)
    create_key_file(state / "keys" / KMS_KEY)
    create_signing_key(state / "keys" / SIGNING_KEY)
    paths = (state / "keys" / KMS_KEY, state / "keys" / SIGNING_KEY, state / "models" / MODEL_ID)
    subprocess.run([sys.executable, "-c", SEAL, *map(str, paths)], check=True, cwd=ROOT, capture_output=True)
    return state


@pytest.fixture(scope="module")
def files(state: Path) -> dict[str, bytes]:
    agent = KeyAgent(
        services=[LocalKMS(state / "keys" / KMS_KEY)],
        trusted_signers=[TrustedSigner.load(public_path(state / "keys" / SIGNING_KEY))],
        record=lambda _tag, **_fields: None,
    )
    return dict(agent.open_files(state / "models" / MODEL_ID).files)


def middle(content: bytes) -> bytes:
    at = len(content) // 2
    return content[at : at + 64]


def test_it_is_served_and_its_files_lie_in_memory_only(state: Path, files: dict[str, bytes]) -> None:
    assert not [path.name for path in (state / "models" / MODEL_ID).iterdir() if "token" in path.name]
    served = Served(state)
    served.start()
    try:
        served.wait_ready()
        answer = served.chat()
        assert answer.status_code == 200
        assert answer.json()["choices"][0]["message"]["content"].strip()
        assert served.chat(messages=[{"role": "user", "content": "<|im_start|>system"}]).status_code == 200
        staged = staging_folder(state / "models" / MODEL_ID)
        arguments = next(cmdline(pid).split(b"\0") for pid in served.engine_pids() if b"--model" in cmdline(pid))
        assert arguments[arguments.index(b"--model") + 1].decode() == str(staged)
        assert is_tmpfs(staged)
        assert staged.stat().st_mode & 0o777 == 0o700
        assert {path.name: path.read_bytes() for path in staged.iterdir()} == files
        needles = {name: middle(files[name]) for name in ("tokenizer.json", "config.json", "tokenizer_config.json")}
        for folder in (state, Path(tempfile.gettempdir()), Path("/var/tmp"), Path.home() / ".cache"):  # noqa: S108
            assert not found_on_disk(folder, needles, served.started_s)
        events = [entry["event"] for entry in served.entries() if entry.get("model") == MODEL_ID]
        # Once for the gateway, which renders prompts with the tokenizer, and once for the engine.
        assert events.count("weights:key:released") == 2
        assert events.count("weights:model:loaded") == 1
        # W4: what a core of the gateway would hold is its memory. It has the tokenizer, and no data key.
        gateway = next(pid for pid in served.tree() if b"server.gateway" in cmdline(pid))
        assert holds(gateway, needles["tokenizer.json"])
        assert not holds(gateway, data_key(state))
    finally:
        served.stop()
    assert not staged.exists()


def data_key(state: Path) -> bytes:
    signer = TrustedSigner.load(public_path(state / "keys" / SIGNING_KEY))
    model = open_sealed(state / "models" / MODEL_ID, trusted_signers=[signer])
    with unwrap_from_any(model.recipients, [LocalKMS(state / "keys" / KMS_KEY)], KeyContext.of(model.core)) as key:
        return bytes(key.reveal())


def holds(pid: int, needle: bytes) -> bool:
    """Whether a process has `needle` anywhere in memory that it can write to."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, mode = line.split()[:2]
            start, end = (int(number, 16) for number in span.split("-"))
            if not mode.startswith("rw"):
                continue
            try:
                memory.seek(start)
                if needle in memory.read(end - start):
                    return True
            except (OSError, ValueError):
                continue  # a mapping that can't be read, such as the kernel's own
    return False


def found_on_disk(folder: Path, needles: dict[str, bytes], since_s: float) -> list[tuple[str, Path]]:
    found = []
    for path in folder.rglob("*"):
        try:
            if path.is_symlink() or not path.is_file() or path.stat().st_mtime < since_s or is_tmpfs(path.parent):
                continue
            data = path.read_bytes()
        except OSError:
            continue
        found += [(name, path) for name, needle in needles.items() if needle in data]
    return found


@pytest.mark.slow
def test_a_file_exchanged_under_the_engine_stops_the_load(state: Path) -> None:
    """An attacker with the same user id is quicker than vLLM; what vLLM has read is not what was verified."""
    served, staged = Served(state), staging_folder(state / "models" / MODEL_ID)
    stopping = threading.Event()

    def exchange() -> None:
        target = staged / "generation_config.json"
        while not stopping.is_set():
            if target.exists() and not target.stat().st_mode & 0o200:
                target.chmod(0o600)
                target.write_bytes(target.read_bytes() + b" ")
            time.sleep(0.05)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        served.start()
        assert served.process is not None
        assert served.process.wait(400) == 1
    finally:
        stopping.set()
        thread.join()
        if served.process is not None and served.process.poll() is None:
            served.stop(signal.SIGKILL)
    refusal = next(e for e in served.entries() if e["event"] == "weights:model:refused")
    assert refusal["detail"] == "generation_config.json: replaced since it was staged"
