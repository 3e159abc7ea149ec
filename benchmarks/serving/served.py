"""One whole Strongroom with a real engine for a benchmark: `strongroom serve` with some engine settings replaced."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import yaml

from benchmarks.gateway.kit import free_port
from benchmarks.orderly import end_orderly
from server.bootstrap import read_env
from server.engine.local import engine_paths
from server.settings import load_settings

if TYPE_CHECKING:
    from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = ROOT / "configs" / "strongroom.yaml"


class NotServedError(Exception):
    """The server did not start; the message has the end of its log."""


@dataclass
class Served:
    """A server while the `with` block runs.

    Attributes:
        state: The state folder, kept between uses: keys and the sealed model stay.
        config: The configuration; the default one serves the embedded model, sealed where it is missing.
        engine: Settings of the first model's engine that win over the file.
        model_path: Another sealed folder for the first model, such as a quantized one.
        limits: Settings of `limits` that win over the file.
        optional: Wait for models that the configuration calls optional, too: one that still starts takes a core.
        limit_s: How long it may take to answer.
    """

    state: Path
    config: Path = DEFAULT_CONFIG
    engine: dict[str, Any] = field(default_factory=dict)
    model_path: str | None = None
    limits: dict[str, Any] = field(default_factory=dict)
    optional: bool = True
    limit_s: float = 900.0
    _process: subprocess.Popen[bytes] | None = None

    def write_config(self) -> Path:
        """The configuration that is served, in the state folder.

        Raises:
            ConfigError: A setting is wrong, by name.
        """
        raw = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        # Folders of rules are relative to the file they stand in; this one stands elsewhere.
        found = load_settings(self.config)
        for name, folder in (
            ("policy", found.policy.directory),
            ("templates", found.templates.directory),
            ("guard", found.guard.directory),
        ):
            raw[name] = {**(raw.get(name) or {}), "directory": str(folder.absolute())}
        first = raw["models"][0]
        first["engine"] = {**(first.get("engine") or {}), **self.engine}
        if self.limits:
            raw["limits"] = {**(raw.get("limits") or {}), **self.limits}
        if self.model_path is not None:
            first["path"] = self.model_path
        path = self.state / "benchmark.yaml"
        path.write_text(yaml.safe_dump(raw), encoding="utf-8")
        load_settings(path)
        return path

    def __enter__(self) -> Self:
        """Start, and return once all models answer.

        Raises:
            NotServedError: It ended, or did not answer in time.
        """
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        config = self.write_config()
        end_orderly()
        self.port = free_port()
        command = [sys.executable, "-m", "server.cli", "serve", "--config", str(config), "--state", str(self.state)]
        command += ["--port", str(self.port), "--admin-port", str(free_port())]
        if self.config == DEFAULT_CONFIG:
            command.append("--prepare-embedded")
        log = self.state / "benchmark.log"
        with log.open("wb") as output:
            env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=env)
        try:
            self._wait(log)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop it."""
        self._stop()

    def _wait(self, log: Path) -> None:
        end_s = time.monotonic() + self.limit_s
        while True:
            if self._process is None or self._process.poll() is not None or time.monotonic() > end_s:
                last = log.read_text(encoding="utf-8", errors="replace")[-1500:]
                raise NotServedError(f"the server did not start; the end of its log:\n{last}")
            if self._is_ready():
                return
            time.sleep(0.25)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status != 200:
                return False
        except OSError:
            return False  # not listening yet
        finally:
            connection.close()
        if not self.optional:
            return True
        ready: dict[str, bool] = json.loads(self._ask_admin("GET", "/admin/status"))["models"]
        return all(ready.values())

    def _stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(90)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def client(self) -> dict[str, str]:
        """`client.env`: OPENAI_BASE_URL, OPENAI_API_KEY, MODEL."""
        return read_env(self.state / "client.env")

    @property
    def admin(self) -> dict[str, str]:
        """`admin.env`: ADMIN_BASE_URL, ADMIN_API_KEY."""
        return read_env(self.state / "admin.env")

    @property
    def engine_url(self) -> str:
        """The engine itself, past the gateway."""
        return f"unix://{engine_paths(self.state.absolute(), self.client['MODEL']).socket}"

    def rendered_ids(self, path: str, body: dict[str, Any]) -> list[int]:
        """The token ids that the engine would get for a request, from the admin listener.

        Raises:
            NotServedError: It refused.
        """
        ids: list[int] = json.loads(self._ask_admin("POST", "/admin/render", {"path": path, "body": body}))["token_ids"]
        return ids

    def _ask_admin(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        admin = self.admin
        address = admin["ADMIN_BASE_URL"].removeprefix("http://")
        connection = http.client.HTTPConnection(address, timeout=60)
        headers = {"authorization": f"Bearer {admin['ADMIN_API_KEY']}", "content-type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise NotServedError(f"the admin listener refused {path}: {response.status}: {answer[:300]!r}")
        return answer
