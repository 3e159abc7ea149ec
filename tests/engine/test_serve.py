"""The main job, as a newcomer runs it: `strongroom serve --prepare-embedded`, real vLLM, the real sealed model."""

import base64
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from benchmarks.gateway.kit import free_port, wait_until
from server.audit.tail import entries_from
from server.audit.verify import Verifier
from server.bootstrap import read_env
from server.sealed.envelope import unwrap_from_any
from server.sealed.kms.base import KeyContext
from server.sealed.kms.local import LocalKMS
from server.sealed.model import open_sealed
from server.sealed.shard import ShardReader
from server.sealed.signature import TrustedSigner

ROOT = Path(__file__).resolve().parents[2]
CHAT, EMBEDDER = "smollm2-135m-instruct", "all-minilm-l6-v2"
pytestmark = pytest.mark.timeout(900)


class Served:
    """One running `strongroom serve`."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.started_s = time.time()

    def start(self) -> None:
        with (self.state.parent / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server.cli", "serve", "--config", str(ROOT / "configs" / "strongroom.yaml"),
                 "--port", str(self.port), "--state", str(self.state), "--prepare-embedded"],
                cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
            )  # fmt: skip

    def wait_ready(self) -> None:
        def ready():
            assert self.process is not None
            assert self.process.poll() is None, (self.state.parent / "serve.log").read_text()
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz").status_code == 200

        wait_until(ready, limit_s=600, pause_s=0.5)

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(signum)
        return self.process.wait(90)

    @property
    def client(self) -> dict[str, str]:
        return read_env(self.state / "client.env")

    def chat(self, **body):
        env = self.client
        return httpx.post(
            env["OPENAI_BASE_URL"] + "/chat/completions",
            json={"model": env["MODEL"], "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16}
            | body,
            headers={"authorization": f"Bearer {env['OPENAI_API_KEY']}"}, timeout=120,
        )  # fmt: skip

    def entries(self):
        return [json.loads(entry) for _, entry in entries_from(self.state / "audit", 0)]

    def tree(self, root: int | None = None) -> list[int]:
        """All processes below `serve`, or below one of its own."""
        assert self.process is not None
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            parents[int(path.parent.name)] = int(fields[1])
        found, level = [], [root or self.process.pid]
        while level:
            level = [pid for pid, parent in parents.items() if parent in level]
            found += level
        return found

    def worker(self) -> int:
        """The chat engine's worker; the embedding engine has one too."""
        model = self.client["MODEL"].encode()
        for pid in self.engine_pids():
            if model in cmdline(pid):
                below = self.tree(pid)
                workers = [one for one in below if b"VLLM::Worker" in cmdline(one)]
                if workers:
                    return workers[0]
        raise AssertionError("the chat engine has no worker")

    def engine_pids(self) -> list[int]:
        return [pid for pid in self.tree() if b"server.engine.vllm" in cmdline(pid) or b"VLLM::" in cmdline(pid)]


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("serve") / "state")
    served.start()
    try:
        served.wait_ready()
        yield served
    finally:
        if served.process is not None and served.process.poll() is None:
            served.stop()


def tensor_run(state: Path) -> bytes:
    """64 bytes from the middle of a weight, decrypted here with the local key."""
    signer = TrustedSigner.load(state / "keys" / "model-signing.pem.pub")
    model = open_sealed(state / "models" / CHAT, trusted_signers=[signer])
    with unwrap_from_any(model.recipients, [LocalKMS(state / "keys" / "kms.key")], KeyContext.of(model.core)) as key:
        reader = ShardReader(model.path, model.weights[0], model.core, key.reveal())
        entry = max(reader.index.entries, key=lambda e: e.num_bytes)
        data = bytearray(entry.num_bytes)
        reader.read_into(entry.name, memoryview(data))
        reader.close()
    middle = len(data) // 2
    return bytes(data[middle : middle + 64])


def test_the_sdk_streams_from_the_env_file_alone(served):
    env = served.client
    assert (served.state / "client.env").stat().st_mode & 0o777 == 0o600
    assert (served.state / "admin.env").stat().st_mode & 0o777 == 0o600
    client = openai.OpenAI(base_url=env["OPENAI_BASE_URL"], api_key=env["OPENAI_API_KEY"])
    stream = client.chat.completions.create(
        model=env["MODEL"], stream=True, max_tokens=24, messages=[{"role": "user", "content": "Write hello world."}]
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text.strip()
    script = f". {served.state}/client.env && {sys.executable} -c 'import os; print(os.environ[\"OPENAI_API_KEY\"])'"
    shell = subprocess.run(
        ["sh", "-c", script],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shell.stdout.strip() == env["OPENAI_API_KEY"]


def test_the_embedding_model_answers_beside_the_chat_model(served):
    env = served.client
    client = openai.OpenAI(base_url=env["OPENAI_BASE_URL"], api_key=env["OPENAI_API_KEY"], max_retries=0)
    headers = {"authorization": f"Bearer {env['OPENAI_API_KEY']}"}
    texts = ["def add(a, b): return a + b", "a function that sums two numbers", "The cat sleeps on the warm stone."]

    def embed(model, form):
        body = {"model": model, "input": texts, "encoding_format": form}
        return httpx.post(env["OPENAI_BASE_URL"] + "/embeddings", json=body, headers=headers, timeout=60)

    def up():
        response = embed(env["EMBEDDING_MODEL"], "float")
        assert response.status_code in (200, 503), response.text
        return response.status_code == 200

    wait_until(up, limit_s=600, pause_s=1)  # it is started last, and nothing waits for it
    plain = embed(EMBEDDER, "float").json()
    assert [item["index"] for item in plain["data"]] == [0, 1, 2]
    code, words, cat = (item["embedding"] for item in plain["data"])
    assert len(code) == 384

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert cosine(code, code) == pytest.approx(1, abs=1e-2)  # they come normalised
    assert cosine(code, words) > 0.4 > 0.2 > cosine(code, cat)
    packed = embed("embedding", "base64").json()["data"][0]["embedding"]
    values = struct.unpack("<384f", base64.b64decode(packed))
    assert cosine(values, code) == pytest.approx(1, abs=1e-2)
    by_sdk = client.embeddings.create(model=EMBEDDER, input=texts)  # asks for base64
    assert cosine(by_sdk.data[2].embedding, cat) == pytest.approx(1, abs=1e-2)
    assert plain["usage"]["prompt_tokens"] == by_sdk.usage.prompt_tokens > 20
    assert served.chat(model=EMBEDDER).status_code == 400
    assert served.chat().status_code == 200
    long = httpx.post(
        env["OPENAI_BASE_URL"] + "/embeddings", json={"model": EMBEDDER, "input": "word " * 400}, headers=headers
    )
    assert long.status_code == 400
    assert long.json()["error"]["code"] == "context_length_exceeded"


def test_no_tensor_stands_in_any_file(served, tmp_path_factory):
    run = tensor_run(served.state)
    assert len(set(run)) > 16
    folders = [served.state, Path("/tmp"), Path("/dev/shm"), Path("/var/tmp")]  # noqa: S108 - searched, not used
    others = tmp_path_factory.getbasetemp()  # plain models of other tests lie there
    for folder in folders:
        for path in folder.rglob("*"):
            try:
                if path.is_symlink() or not path.is_file() or path.stat().st_mtime < served.started_s:
                    continue
                if path.is_relative_to(others) and not path.is_relative_to(served.state):
                    continue
                data = path.read_bytes()
            except OSError:
                continue
            assert run not in data, path


def test_the_engine_listens_on_nothing_that_the_host_sees(served):
    pids = served.engine_pids()
    assert len(pids) >= 3
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = str(descriptor.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    for table in ("/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp", "/proc/net/udp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes:
                assert fields[1].split(":")[0] in ("0100007F", "00000000000000000000000001000000"), line
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[6] in inodes:
            folder = Path(fields[7]).parent
            assert folder.stat().st_mode & 0o077 == 0, line


def test_a_client_that_leaves_stops_the_engine(served):
    env = served.client
    admin = read_env(served.state / "admin.env")

    def running():
        headers = {"authorization": f"Bearer {admin['ADMIN_API_KEY']}"}
        text = httpx.get(admin["ADMIN_BASE_URL"] + "/metrics", headers=headers, timeout=10).text
        lines = [line for line in text.splitlines() if line.startswith("vllm:num_requests_running{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines)

    body = {
        "model": env["MODEL"],
        "stream": True,
        "max_tokens": 2000,
        "temperature": 1.5,
        "messages": [{"role": "user", "content": "Count to ten thousand."}],
    }
    seen = 0.0
    for _ in range(5):  # the model is free to be brief
        with httpx.stream(
            "POST",
            env["OPENAI_BASE_URL"] + "/chat/completions",
            json=body,
            timeout=60,
            headers={"authorization": f"Bearer {env['OPENAI_API_KEY']}"},
        ) as response:
            for _ in zip(range(12), response.iter_lines(), strict=False):
                seen = max(seen, running())
        if seen:
            break
    assert seen == 1
    wait_until(lambda: running() == 0, limit_s=2, pause_s=0.1)


def test_a_killed_engine_is_answered_with_503_and_comes_back(served):
    results = []

    def ask():
        try:
            results.append(served.chat(stream=True, max_tokens=400, temperature=1.5))
        except httpx.HTTPError as err:
            results.append(err)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(3)
    os.kill(served.worker(), signal.SIGKILL)
    thread.join(60)
    (result,) = results
    events = [line[6:] for line in result.text.splitlines() if line.startswith("data: ")]
    assert result.status_code in (502, 503) or "error" in json.loads(events[-1])
    wait_until(lambda: served.chat().status_code == 503, limit_s=60, pause_s=0.1)
    response = served.chat()
    assert int(response.headers["retry-after"]) >= 1
    assert httpx.get(f"http://127.0.0.1:{served.port}/livez").status_code == 200
    wait_until(lambda: served.chat().status_code == 200, limit_s=600, pause_s=1)
    Verifier(served.state / "audit").verify()
    events = [entry["event"] for entry in served.entries()]
    assert "supervisor:engine:died" in events or "supervisor:engine:unhealthy" in events
    released = [e["model"] for e in served.entries() if e["event"] == "weights:key:released"]
    assert sorted(released) == [EMBEDDER, CHAT, CHAT]


def test_a_stop_leaves_no_process_and_a_flipped_bit_is_refused_by_name(served):
    pids = served.tree()
    before = served.client
    assert served.stop(signal.SIGINT) == 0
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), limit_s=10)
    Verifier(served.state / "audit").verify()
    shard = next((served.state / "models" / CHAT).glob("*.sealed"))
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    served.start()
    assert served.process is not None
    assert served.process.wait(400) == 1
    refusal = next(e for e in served.entries() if e["event"] == "weights:model:refused")
    assert shard.name in refusal["detail"]
    assert "chunk" in refusal["detail"]
    assert refusal["detail"] in (served.state.parent / "serve.log").read_text()
    assert served.client == before
