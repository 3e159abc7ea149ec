"""The embedded model sealed in full precision and by every method of `quantize`, each served from its seal by vLLM.

`python -m benchmarks.sealed.quantized`: size on disk, memory, tokens a second and perplexity on the standard library's
own sources, one engine at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from benchmarks.sealed.load import setting
from server.sealed.agent import KEY_FD_ENV, KeyAgent
from server.sealed.kms.local import LocalKMS, create_key_file
from server.sealed.quantize import METHODS, quantize_source
from server.sealed.seal import seal_model
from server.sealed.signature import LocalSigner, TrustedSigner

PROMPT = "Write a Python function that parses an INI file and returns a dictionary."
STDLIB = ("heapq", "bisect", "textwrap", "shlex", "fnmatch", "colorsys", "statistics", "csv")
WINDOW_TOKENS, MAX_WINDOWS, NUM_TOKENS = 512, 24, 96


def seal_embedded(folder: Path, method: str) -> dict[str, Any]:
    """Seal the embedded model and return what an engine needs to load it."""
    from server.sealed.embedded import load_embedded

    create_key_file(folder / "key")
    signer = LocalSigner(ec.generate_private_key(ec.SECP256R1()))
    source = load_embedded()
    started = time.perf_counter()
    seal_model(
        source if method == "bf16" else quantize_source(source, method),
        folder / "model",
        model_id="smollm2",
        version=1,
        services=[LocalKMS(folder / "key")],
        signer=signer,
    )
    seconds = time.perf_counter() - started
    agent = KeyAgent(
        services=[LocalKMS(folder / "key")],
        trusted_signers=[TrustedSigner.of(signer.public_key)],
        record=lambda _tag, **_fields: None,
    )
    release = agent.release(folder / "model")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    agent.serve(ours, release)
    os.environ[KEY_FD_ENV] = str(theirs.detach())
    return {
        "method": method,
        "seal_s": seconds,
        "bytes": sum(s.header.payload_bytes for s in release.model.weights),
        "manifest_sha256": release.model.manifest_digest.hex(),
    }


def measure(folder: Path, method: str) -> dict[str, Any]:
    """One method in this process."""
    facts = seal_embedded(folder, method)
    from vllm import LLM, SamplingParams

    extra = {"manifest_sha256": facts.pop("manifest_sha256")}
    llm = LLM(
        str(folder / "model"), load_format="strongroom", model_loader_extra_config=extra, enforce_eager=True,
        max_model_len=1024, seed=0,
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    chat = [{"role": "user", "content": PROMPT}]
    llm.chat(chat, greedy, use_tqdm=False)
    speeds = []
    for _ in range(3):
        started = time.perf_counter()
        answer = llm.chat(chat, greedy, use_tqdm=False)[0].outputs[0]
        speeds.append(len(answer.token_ids) / (time.perf_counter() - started))
    facts |= {"tokens_s": sorted(speeds)[1], "answer": answer.text[:200], "worker_pss_bytes": largest_child_pss()}
    return facts | {"perplexity": perplexity(llm)}


def perplexity(llm: Any) -> float:
    """Over windows of the standard library's sources."""
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    text = "".join(Path(__import__(name).__file__).read_text() for name in STDLIB)
    ids = tokenizer.encode(text)
    starts = range(0, len(ids) - WINDOW_TOKENS, WINDOW_TOKENS)[:MAX_WINDOWS]
    prompts = [{"prompt_token_ids": ids[start : start + WINDOW_TOKENS]} for start in starts]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    total, count = 0.0, 0
    for output in llm.generate(prompts, params, use_tqdm=False):
        for token, scores in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            total += scores[token].logprob
            count += 1
    return math.exp(-total / count)


def largest_child_pss() -> int:
    """Proportional memory of the biggest process below this one: the worker."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    sizes = [0]
    for pid in below:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        sizes += [int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")]
    return max(sizes)


def main(argv: list[str] | None = None) -> int:
    """Measure every method in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", choices=("bf16", *METHODS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.set_defaults(rounds=3, threads=2, cold=False)
    args = parser.parse_args(argv)
    if args.child:
        with tempfile.TemporaryDirectory() as scratch:
            print("RESULT " + json.dumps(measure(Path(scratch), args.child)), flush=True)
        return 0
    rows = []
    for method in args.method or ("bf16", *METHODS):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.sealed.quantized", "--child", method],
            capture_output=True, text=True, check=False,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
        )  # fmt: skip
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            print(f"{method} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", file=sys.stderr)
            return 1
        row = json.loads(found[0][7:])
        rows.append(row)
        print(
            f"{method:9} {row['bytes'] / 1e6:7.1f} MB  worker {row['worker_pss_bytes'] / 2**20:6.0f} MiB  "
            f"{row['tokens_s']:5.1f} tokens/s  perplexity {row['perplexity']:.3f}",
            flush=True,
        )
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"setting": setting(args), "rows": rows}
    (args.out / "sealed-quantized.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
