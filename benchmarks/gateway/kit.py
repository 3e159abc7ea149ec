"""A whole gateway for tests and benchmarks: real processes, sockets and log; only the engine is an instant one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

from benchmarks.instant_engine import Script
from server.audit.client import SyncAuditClient, wait_for_writer
from server.audit.entry import new_entry
from server.audit.tail import entries_from
from server.auth.key_admin import KeyAdmin, KeySpec
from server.auth.pepper import load_pepper
from server.bootstrap import prepare_folders, prepare_secrets
from server.engine.local import engine_paths
from server.sealed.kms.local import LocalKMS, create_key_file
from server.sealed.seal import seal_model
from server.sealed.signature import LocalSigner, create_signing_key, public_path
from server.sealed.source import MemoryShard, Tensor, prepare
from server.settings import Settings, parse_settings
from server.store.database import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tiny-coder"
EMBEDDER = "tiny-embedder"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer_files() -> dict[str, bytes]:
    """A byte-level BPE tokenizer with ChatML's control tokens, trained in a moment."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def add(a, b):\n    return a + b\n", "the quick brown fox"], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    config = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until(check: Any, *, limit_s: float = 60.0, pause_s: float = 0.02) -> None:
    """Return once `check()` is true."""
    end_s = time.monotonic() + limit_s
    while True:
        try:
            if check():
                return
        except (OSError, httpx.HTTPError):
            pass
        if time.monotonic() > end_s:
            raise TimeoutError("not within the limit")
        time.sleep(pause_s)


@dataclass
class GatewayKit:
    """One gateway, its log and its engines."""

    state: Path
    settings: Settings
    signer: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    gateway_program: tuple[str, ...] = ("-m", "server.gateway")

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.settings.public.port}"

    @property
    def admin(self) -> str:
        return f"http://127.0.0.1:{self.settings.admin.port}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def start(self) -> None:
        self.start_writer()
        for model in self.settings.models:
            self.start_engine(model.id, *(word for adapter in model.adapters for word in ("--adapter", adapter.id)))
        self.start_gateway()

    def _spawn(self, name: str, *argv: str) -> None:
        log = (self.state / "logs" / f"{name}.log").open("ab")
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        self.processes[name] = subprocess.Popen([sys.executable, *argv], stdout=log, stderr=log, env=env, cwd=ROOT)
        log.close()

    def start_writer(self) -> None:
        settings = self.settings
        self._spawn(
            "writer",
            "-m",
            "server.audit.writer",
            "--dir",
            str(settings.audit_dir),
            "--key",
            settings.audit.key or str(settings.keys_dir / "audit.key"),
            "--origin",
            settings.audit.origin,
            "--socket",
            str(settings.audit_socket),
        )
        wait_for_writer(settings.audit_socket, deadline_s=120)

    def start_engine(self, model_id: str, *options: str) -> None:
        path = engine_paths(self.settings.state, model_id).socket
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._spawn(
            f"engine-{model_id}", "-m", "benchmarks.instant_engine", "--uds", str(path), "--model", model_id, *options
        )
        wait_until(path.exists, limit_s=120)

    def start_gateway(self, *, ready: bool = True) -> None:
        resolved = self.state / "settings.json"
        resolved.write_text(self.settings.model_dump_json())
        self._spawn("gateway", *self.gateway_program, "--settings", str(resolved))
        path = "/readyz" if ready else "/livez"
        wait_until(lambda: httpx.get(self.base + path).status_code == 200, limit_s=180)

    def control(self, model_id: str = MODEL, **script: Any) -> None:
        """Tell the instant engine how to answer from now on; what is not named is as at the start."""
        with self.engine(model_id) as client:
            client.post("/control", json=asdict(Script()) | script).raise_for_status()

    def stats(self, model_id: str = MODEL) -> dict[str, Any]:
        with self.engine(model_id) as client:
            answer: dict[str, Any] = client.get("/stats").json()
            return answer

    def engine(self, model_id: str) -> httpx.Client:
        path = engine_paths(self.settings.state, model_id).socket
        return httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://engine")

    def new_key(
        self,
        *,
        groups: set[str],
        scopes: set[str] | None = None,
        tenant: str = "a",
        subject: str = "s",
        expires_at_s: float | None = None,
    ) -> str:
        """Draw an API key, on the log like any other."""
        store = Store.open(self.settings.store_url)
        client = SyncAuditClient(self.settings.audit_socket)
        try:

            def record(event: str, **fields: Any) -> None:
                client.append(new_entry(event, **fields))

            admin = KeyAdmin(store, load_pepper(self.settings.keys_dir / "pepper"), record=record, by="test")
            spec = KeySpec(subject, tenant, frozenset(groups), frozenset(scopes or {"*"}), expires_at_s)
            _, secret = admin.create(spec)
        finally:
            client.close()
            store.close()
        return secret.reveal()

    def working_key(self, **spec: Any) -> str:
        """Draw an API key that the gateway knows already."""
        key = self.new_key(**spec)
        self.wait_for_key(key)
        return key

    def wait_for_key(self, key: str) -> None:
        """Return once the gateway has heard of a new key."""
        headers = {"authorization": f"Bearer {key}"}
        # Asked more often, a fast machine is told to wait: each answer until then is a failed authentication.
        wait_until(lambda: httpx.get(self.base + "/v1/models", headers=headers).status_code == 200, pause_s=0.25)

    def entries(self) -> list[dict[str, Any]]:
        """All entries of the log, in order."""
        return [json.loads(entry) for _, entry in entries_from(self.settings.audit_dir, 0)]

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()

    def stop(self) -> None:
        for name in reversed(list(self.processes)):
            process = self.processes[name]
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def seal_tiny(folder: Path, keys: Path, model_id: str, *, files: dict[str, bytes] | None = None) -> Path:
    """A signed, sealed model with a real tokenizer and a few weights."""
    if not (keys / "kms.key").exists():
        create_key_file(keys / "kms.key")
        create_signing_key(keys / "signing.pem")
    config = {"model_type": "tiny", "dtype": "bfloat16", "max_position_embeddings": 8192}
    every = {"config.json": json.dumps(config).encode(), **(files or tokenizer_files())}
    source = prepare([MemoryShard([Tensor("w", "BF16", (16, 16), memoryview(bytes(512)))])], every)
    seal_model(
        source,
        folder,
        model_id=model_id,
        version=1,
        services=[LocalKMS(keys / "kms.key")],
        signer=LocalSigner.load(keys / "signing.pem"),
    )
    return folder


def make_kit(state: Path, **overrides: Any) -> GatewayKit:
    """A kit whose processes are not started yet."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    prepare_folders(state)
    files = tokenizer_files()
    for model_id in (MODEL, EMBEDDER):
        seal_tiny(state / "models" / model_id, state / "keys", model_id, files=files)
    signer = public_path(state / "keys" / "signing.pem")
    raw: dict[str, Any] = {
        "state": str(state),
        "public": {
            "port": free_port(),
            "header_timeout_s": 1.0,
            "body_timeout_s": 1.5,
            "write_timeout_s": 2.0,
            "heartbeat_s": 1.0,
            "drain_s": 2.0,
        },
        "admin": {"port": free_port()},
        "models": [
            {
                "id": MODEL,
                "path": MODEL_FOLDER.format(MODEL),
                "aliases": ["default", "autocomplete"],
                "engine": {"max_model_len": 4096},
            },
            {
                "id": EMBEDDER,
                "path": MODEL_FOLDER.format(EMBEDDER),
                "engine": {"runner": "pooling", "max_model_len": 256},
            },
        ],
        "seal": {"trusted_signers": [str(signer)]},
        "policy": {"directory": str(ROOT / "configs" / "policy")},
        "templates": {"directory": str(ROOT / "configs" / "templates")},
    }
    for name, value in overrides.items():
        raw[name] = {**raw[name], **value} if isinstance(raw.get(name), dict) else value
    settings = parse_settings(raw, base=ROOT / "configs")
    prepare_secrets(settings)
    return GatewayKit(state, settings, signer)


MODEL_FOLDER = "models/{}"


@contextmanager
def standing_kit(parent: Path | None, **overrides: Any) -> Iterator[GatewayKit]:
    """A kit that runs, in a folder of its own below `parent`, until the block ends."""
    with (
        tempfile.TemporaryDirectory(prefix="sr-bench-", dir=parent, ignore_cleanup_errors=True) as folder,
        make_kit(Path(folder) / "state", **overrides) as kit,
    ):
        yield kit
