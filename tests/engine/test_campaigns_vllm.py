"""Long runs with real vLLM behind the whole gateway: LoRA adapters as models, a thousand streams that clients leave."""

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from benchmarks.gateway.kit import free_port, wait_until
from server.audit.tail import entries_from
from server.bootstrap import read_env
from server.engine.local import engine_paths
from server.registry.adapters import digest_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
LAYERS, HIDDEN, VALUES, RANK = 30, 576, 192, 8  # of the embedded model
TURN = [{"role": "user", "content": "Write a very long story about a ship and the sea."}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": TURN},
    "/v1/completions": {"prompt": "def f():"},
    "/v1/responses": {"input": "Write a very long story about a ship and the sea."},
    "/v1/messages": {"max_tokens": 3000, "messages": TURN},
    "/v1/fim/completions": {"prompt": "def f():", "suffix": "\n"},
    "/infill": {"input_prefix": "def f():", "input_suffix": "\n"},
}
AT_ONCE = 32
MOST_S = 3.0


def write_adapter(folder: Path, scale: float) -> str:
    """Write a LoRA adapter of the embedded model's shapes; one of scale 0 changes nothing. Returns its digest."""
    folder.mkdir()
    drawn = np.random.default_rng(1)
    tensors = {}
    for layer in range(LAYERS):
        for name, rows in (("q_proj", HIDDEN), ("v_proj", VALUES)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = drawn.normal(0, 0.1, (RANK, HIDDEN)).astype(np.float32)
            tensors[f"{stem}.lora_B.weight"] = drawn.normal(0, scale, (rows, RANK)).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["q_proj", "v_proj"]}
    config |= {"task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": MODEL}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return digest_adapter(folder)


class Served:
    """`strongroom serve` with the embedded model and two adapters of it."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        adapters = [
            {"id": name, "path": str(folder / name), "sha256": write_adapter(folder / name, scale)}
            for name, scale in (("same", 0.0), ("other", 0.1))
        ]
        limits = folder / "limits.yaml"
        limits.write_text("limits: []\nmax_wait_s: 60\n")
        port = free_port()
        engine = {"max_model_len": 4096, "kv_cache_gib": 1, "enforce_eager": True}
        raw = {
            "state": str(self.state), "public": {"port": port}, "admin": {"port": free_port()},
            "models": [{"id": MODEL, "path": f"models/{MODEL}", "aliases": ["autocomplete"], "engine": engine,
                        "adapters": adapters}],
            "limits": {"file": str(limits), "max_running": 256, "max_completions": 256},
            **{name: {"directory": str(ROOT / "configs" / folder)}
               for name, folder in (("policy", "policy"), ("templates", "templates"), ("guard", "guard"))},
        }  # fmt: skip
        config = folder / "strongroom.yaml"
        config.write_text(yaml.safe_dump(raw))
        self.base = f"http://127.0.0.1:{port}"
        self.port = port
        self.log = folder / "serve.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server.cli", "serve", "--config", str(config), "--prepare-embedded"],
                cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
            )  # fmt: skip

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return httpx.get(f"{self.base}/readyz").status_code == 200

    @property
    def key(self) -> str:
        return read_env(self.state / "client.env")["OPENAI_API_KEY"]

    def say(self, model: str) -> Any:
        body = {"model": model, "messages": TURN, "max_tokens": 24, "temperature": 0}
        headers = {"authorization": f"Bearer {self.key}"}
        answer = httpx.post(f"{self.base}/v1/chat/completions", json=body, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == model
        return answer.json()["choices"][0]["message"]["content"]

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(entry) for _, entry in entries_from(self.state / "audit", 0)]

    def waiting(self) -> int:
        """Requests that the engine runs or has queued, as it says."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(engine_paths(self.state, MODEL).socket))) as client:
            lines = client.get("http://engine/metrics").text.splitlines()
        gauges = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return round(sum(float(line.split()[-1]) for line in lines if line.startswith(gauges)))

    def held(self) -> dict[str, tuple[int, float]]:
        """File descriptors and resident MiB of the gateway and of each process of the engine, by command line."""
        found = {}
        for pid in below(self.process.pid):
            folder = Path(f"/proc/{pid}")
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            if "server.gateway" in line or "server.engine.vllm" in line or "VLLM::" in line:
                pages = int((folder / "statm").read_text().split()[1])
                found[f"{pid} {line[:40]}"] = (len(list((folder / "fd").iterdir())), pages * 4096 / 2**20)
        return found


def below(root: int) -> list[int]:
    found, level = [], [root]
    while level:
        pid = level.pop()
        children = [int(c) for path in Path(f"/proc/{pid}/task").glob("*/children") for c in path.read_text().split()]
        found += children
        level += children
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("campaigns"))
    try:
        wait_until(served.is_ready, limit_s=900, pause_s=0.5)
        yield served
    finally:
        served.process.send_signal(signal.SIGTERM)
        served.process.wait(90)


def test_an_adapter_is_a_model_of_its_own(served):
    headers = {"authorization": f"Bearer {served.key}"}
    names = {entry["id"] for entry in httpx.get(f"{served.base}/v1/models", headers=headers).json()["data"]}
    assert {MODEL, "same", "other"} <= names
    plain = served.say(MODEL)
    assert served.say("same") == plain
    assert served.say("other") != plain
    accepted = {e["model"]: e for e in served.entries() if e["event"] == "gateway:request:accepted"}
    digests = {name: accepted[name]["model_digest"] for name in (MODEL, "same", "other")}
    assert len(set(digests.values())) == 3


async def leave(served, route, after_s, gate):
    """Ask for a stream and close the socket after a while; returns whether text had come, and whether it had ended."""
    data = json.dumps({"model": MODEL, "stream": True, **BODIES[route]}).encode()
    head = (
        f"POST {route} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {served.key}\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    )
    got = bytearray()

    async def read() -> None:
        while data := await reader.read(65536):
            got.extend(data)

    async with gate:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(head.encode() + data)
        await writer.drain()
        reading = asyncio.create_task(read())
        await asyncio.wait([reading], timeout=after_s)
        ended = reading.done()
        reading.cancel()
        writer.close()
        await writer.wait_closed()
    assert not got or got.startswith(b"HTTP/1.1 200 "), bytes(got[:300])
    return bool(got), ended


async def leave_all(served, count, seed):
    chance = random.Random(seed)  # noqa: S311 - moments, not secrets
    gate = asyncio.Semaphore(AT_ONCE)
    routes = list(BODIES)
    left = [
        leave(served, routes[number % len(routes)], max(0.0, chance.uniform(-0.1, MOST_S)), gate)
        for number in range(count)
    ]
    seen = await asyncio.gather(*left)
    return sum(begun for begun, _ in seen), sum(ended for _, ended in seen)


def outcomes(served):
    last = ("gateway:request:finished", "gateway:request:refused")
    return Counter(entry["outcome"] for entry in served.entries() if entry["event"] in last)


def test_a_thousand_streams_that_are_left_at_random_moments(served):
    before = outcomes(served)
    _, ended_at_first = asyncio.run(leave_all(served, 200, seed=1))  # pools and caches fill
    wait_until(lambda: served.waiting() == 0, limit_s=2)
    wait_until(lambda: (outcomes(served) - before).total() == 200)
    at_first = served.held()
    begun, ended = asyncio.run(leave_all(served, 1000, seed=2))
    left_s = time.monotonic()
    wait_until(lambda: served.waiting() == 0, limit_s=2)
    idle_s = time.monotonic() - left_s
    wait_until(lambda: (outcomes(served) - before).total() == 1200)
    found = outcomes(served) - before
    at_last = served.held()
    print(f"{begun} of 1,000 streams had begun, {ended} had ended; idle after {idle_s:.2f} s; {found}")
    print(at_first, at_last, sep="\n")
    assert begun > 300  # and the rest were left before the first token, in a queue or in the prefill
    assert ended < 50  # the model may find an end by itself
    assert set(found) <= {"aborted", "completed"}
    assert found["completed"] <= ended_at_first + ended + 5  # some end while their client leaves
    assert set(at_last) == set(at_first)
    for name, (fds, resident) in at_last.items():
        assert fds <= at_first[name][0] + 4, name  # idle connections come and go
        assert resident <= at_first[name][1] * 1.1 + 16, name
