"""Load model folders with vLLM's own model classes in this process; run by tests and benchmarks as a program.

`python -m tests.engine.sealed_loading JOB.json`; a job names `plain` and `sealed` folders, `signer`, `key`;
prints one JSON line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROUNDS = 1


@contextlib.contextmanager
def key_agent(job: dict[str, Any]):
    """Release the key to a socket, as the supervisor does; the worker's end is where it expects it."""
    from server.sealed.agent import KEY_FD_ENV, KeyAgent
    from server.sealed.kms.local import LocalKMS
    from server.sealed.signature import TrustedSigner

    agent = KeyAgent(
        services=[LocalKMS(Path(job["key"]))],
        trusted_signers=[TrustedSigner.load(Path(job["signer"]))],
        record=lambda _tag, **_fields: None,
    )
    release = agent.release(Path(job["sealed"]))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread: threading.Thread = agent.serve(ours, release)
    os.environ[KEY_FD_ENV] = str(theirs.detach())
    yield release.model.manifest_digest.hex()
    thread.join(10)


def load(folder: str, load_format: str, extra: dict[str, Any], quantization: str | None) -> tuple[Any, float]:
    """Return the model and the seconds that vLLM spent in `load_weights`."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    config = EngineArgs(
        model=folder,
        load_format=load_format,
        quantization=quantization,
        model_loader_extra_config=extra,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
    ).create_engine_config()
    with set_current_vllm_config(config):
        start_distributed()
        loader = get_model_loader(config.load_config)
        seconds = 0.0
        inner = loader.load_weights

        def timed(*args: Any) -> None:
            nonlocal seconds
            started = time.perf_counter()
            inner(*args)
            seconds = time.perf_counter() - started

        loader.load_weights = timed
        return loader.load_model(vllm_config=config, model_config=config.model_config), seconds


def start_distributed() -> None:
    """One rank, once a process."""
    import torch
    from vllm.distributed import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        import tempfile

        handle, name = tempfile.mkstemp()
        os.close(handle)
        torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
        parallel_state.init_distributed_environment(1, 0, f"file://{name}", 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)


def digest(model: Any) -> dict[str, str]:
    """SHA-256 of every parameter's and buffer's bytes, by name."""
    import torch

    return {
        name: hashlib.sha256(t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in model.state_dict().items()
        if t.numel()
    }


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Load plain and sealed in turn; tell whether every parameter is the same, and how long each took."""
    from server.errors import SealError

    result: dict[str, Any] = {"name": job["name"], "plain_s": [], "sealed_s": []}
    for _ in range(job.get("rounds", ROUNDS)):
        with key_agent(job) as manifest_sha256:
            extra = {"manifest_sha256": manifest_sha256} | job.get("extra", {})
            try:
                sealed, seconds = load(job["sealed"], "strongroom", extra, job.get("quantization"))
            except SealError as err:
                return result | {"refused": err.kind, "detail": err.detail}
        result["sealed_s"].append(seconds)
        sealed_digest = digest(sealed)
        del sealed
        plain, seconds = load(job["plain"], "safetensors", {}, job.get("quantization"))
        result["plain_s"].append(seconds)
        result["equal"] = digest(plain) == sealed_digest
        result["num_parameters"] = len(sealed_digest)
        del plain
    return result


def main() -> int:
    """Run the jobs of a file and print one JSON line for each."""
    from server.engine.vllm.plugin import register

    register()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        print("RESULT " + json.dumps(run(job)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
