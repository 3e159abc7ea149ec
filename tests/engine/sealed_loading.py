"""Load model folders with vLLM's own model classes in this process; run by tests and benchmarks as a program.

`python -m tests.engine.sealed_loading JOB.json`; a job names `plain` and `sealed` folders, `signer`, `key`;
prints one JSON line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run_jobs(jobs: list[dict[str, Any]], folder: Path, *, timeout_s: float = 280) -> list[dict[str, Any]]:
    """Run this program on `jobs` in a new process and return what it tells of each.

    Raises:
        RuntimeError: It did not tell of all; with the end of what it printed.
    """
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.sealed_loading", str(folder / "jobs.json")],
        capture_output=True, text=True, cwd=ROOT, check=False, timeout=timeout_s,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
    )  # fmt: skip
    found = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if len(found) != len(jobs):
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
    return found


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


FUSED = re.compile(r"\.(q|k|v|gate|up)_proj\.")


def load(
    folder: str, load_format: str, extra: dict[str, Any], quantization: str | None
) -> tuple[dict[str, str], int, dict[str, float]]:
    """Return digests of the model's parameters, their bytes in all, and the seconds that vLLM spent in `load_weights`.

    Digests are taken when the weights are loaded and again when vLLM has processed them: a CPU's layers keep packed
    copies out of sight then, and an empty parameter in place of their weight. Seconds are told for `all`, and for the
    weights that became a parameter each (`whole`) or part of one (`fused`).
    """
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
        seconds = {"all": 0.0, "whole": 0.0, "fused": 0.0}
        inner, weights = loader.load_weights, getattr(loader, "get_all_weights", None)

        digests: dict[str, str] = {}
        num_bytes = 0

        def timed(model: Any, *args: Any) -> None:
            nonlocal num_bytes
            started = time.perf_counter()
            inner(model, *args)
            seconds["all"] = time.perf_counter() - started
            num_bytes = sum(parameter.nbytes for parameter in model.parameters())
            digests.update({f"loaded {name}": value for name, value in digest(model).items()})

        def timed_weights(*args: Any) -> Any:
            assert weights is not None
            for name, tensor in weights(*args):
                started = time.perf_counter()
                yield name, tensor
                seconds["fused" if FUSED.search(name) else "whole"] += time.perf_counter() - started

        loader.load_weights = timed
        if weights is not None:
            loader.get_all_weights = timed_weights
        model = loader.load_model(vllm_config=config, model_config=config.model_config)
        return digests | {f"processed {name}": value for name, value in digest(model).items()}, num_bytes, seconds


@contextlib.contextmanager
def counted_kernels():
    """Yield a list that gets the bytes of every call that opens chunks with a kernel, the opener's own check aside."""
    from server.engine.vllm.device_open import DeviceOpener

    opened: list[int] = []
    inner = DeviceOpener.open_into

    def counting(self: Any, reader: Any, name: str, offset: int, destination: Any) -> None:
        inner(self, reader, name, offset, destination)
        opened.append(destination.numel())

    DeviceOpener.open_into = counting  # type: ignore[method-assign]
    try:
        yield opened
    finally:
        DeviceOpener.open_into = inner  # type: ignore[method-assign]


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
    """Load plain and sealed, or one of the `ways`; tell whether every parameter is the same, and the times."""
    from server.errors import SealError

    result: dict[str, Any] = {"name": job["name"], "plain_s": [], "sealed_s": []}
    quantization = job.get("quantization")
    digests: dict[str, dict[str, str]] = {}
    for way in job.get("ways", ("sealed", "plain")):
        if way == "plain":
            digests[way], _, seconds = load(job["plain"], "safetensors", {}, quantization)
        else:
            with key_agent(job) as manifest_sha256, counted_kernels() as opened:
                extra = {"manifest_sha256": manifest_sha256} | job.get("extra", {})
                try:
                    digests[way], num_bytes, seconds = load(job["sealed"], "strongroom", extra, quantization)
                except SealError as err:
                    return result | {"refused": err.kind, "detail": err.detail}
            result |= {"num_kernel_bytes": sum(opened), "num_bytes": num_bytes}
        result[f"{way}_s"].append(seconds)
    if len(digests) == 2:
        result["num_parameters"] = sum(name.startswith("loaded ") for name in digests["sealed"])
        result["equal"] = digests["plain"] == digests["sealed"]
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
