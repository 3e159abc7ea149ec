"""LiteLLM's proxy before the same instant engine: a baseline that others know, from an environment of its own."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gateway.kit import MODEL, ROOT, free_port, wait_until


@dataclass
class LiteLLM:
    """One running proxy and its engine."""

    port: int
    key: str
    version: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def stop(self) -> None:
        """End both."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def start_litellm(python: Path, folder: Path, layout: dict[str, list[int]]) -> LiteLLM:
    """Start the proxy with one worker on the gateway's core, its engine on the other.

    Args:
        python: The interpreter of an environment that has `litellm[proxy]`.
        folder: Where its configuration and log go.
        layout: Cores of `gateway` and `rest`.

    Raises:
        SystemExit: LiteLLM is not installed there, or does not start.
    """
    asked = "import importlib.metadata as m; print(m.version('litellm'))"
    found = subprocess.run([str(python), "-c", asked], capture_output=True, text=True, check=False)
    program = python.parent / "litellm"
    if found.returncode != 0 or not program.exists():
        raise SystemExit(f"{python} has no LiteLLM; make an environment and install litellm[proxy] into it.")
    engine_port, port = free_port(), free_port()
    key = f"sk-{secrets.token_urlsafe(32)}"
    model = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{engine_port}/v1", "api_key": "none"}
    config = folder / "litellm.json"  # JSON is YAML
    config.write_text(json.dumps({"model_list": [{"model_name": MODEL, "litellm_params": model}]}))
    config.chmod(0o600)
    env = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    env |= {"LITELLM_MASTER_KEY": key, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    started = LiteLLM(port, key, found.stdout.strip())
    with (folder / "litellm.log").open("ab") as log:
        # fmt: off
        engine = [sys.executable, "-m", "benchmarks.instant_engine", "--port", str(engine_port), "--model", MODEL,
                  "--num-tokens", "64"]
        proxy = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port),
                 "--num_workers", "1"]
        # fmt: on
        started.processes.append(subprocess.Popen(engine, cwd=ROOT, stdout=log, stderr=log))
        started.processes.append(subprocess.Popen(proxy, env=env, cwd=folder, stdout=log, stderr=log))

    def listens() -> bool:
        if any(process.poll() is not None for process in started.processes):
            raise SystemExit(f"LiteLLM ended at its start:\n{(folder / 'litellm.log').read_text()[-2000:]}")
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True

    try:
        wait_until(listens, limit_s=120, pause_s=0.2)
    except BaseException:
        started.stop()
        raise
    for process, cores in zip(started.processes, (layout["rest"], layout["gateway"]), strict=True):
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), cores)
    return started
