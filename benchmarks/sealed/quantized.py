"""The embedded model sealed in full precision, by every method of `quantize`, and from checkpoints in the forms of GPTQ
and AWQ (`benchmarks.sealed.packed`), each served by the whole server.

`python -m benchmarks.sealed.quantized` (`strongroom bench quantized`): for each method `strongroom serve` is started on
the sealed model and asked over HTTP, through gateway, policy, template, guard and audit. Told are the size on disk, the
worker's memory, tokens a second as a client sees them, and the engine's perplexity on the standard library's own
sources. One server at a time; the results of several runs go into one file, so that `--measure speed` can be repeated
on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.gateway.kit import free_port, wait_until
from benchmarks.sealed.load import setting
from benchmarks.sealed.packed import FORMS, write_checkpoint
from benchmarks.serving.served import Served
from server.bootstrap import KMS_KEY, SIGNING_KEY, prepare_folders, read_env
from server.engine.local import engine_paths
from server.sealed.embedded import MODEL_ID, load_embedded
from server.sealed.kms.local import LocalKMS, create_key_file
from server.sealed.quantize import METHODS, quantize_source
from server.sealed.seal import seal_model
from server.sealed.signature import LocalSigner, create_signing_key
from server.sealed.source import load_source

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "Write a Python function that parses an INI file and returns a dictionary."
STDLIB = ("heapq", "bisect", "textwrap", "shlex", "fnmatch", "colorsys", "statistics", "csv")
WINDOW_TOKENS, MAX_WINDOWS, NUM_TOKENS, NUM_ANSWERS = 512, 24, 96, 5
METHOD_NAMES = ("bf16", *METHODS, *FORMS)


def seal(state: Path, method: str) -> None:
    """Seal the embedded model into a new state folder; run in a process of its own, whose memory goes with it."""
    prepare_folders(state)
    create_key_file(state / "keys" / KMS_KEY)
    create_signing_key(state / "keys" / SIGNING_KEY)
    source = load_embedded()
    if method in FORMS:
        write_checkpoint(state / "plain", source, FORMS[method])
        source = load_source(state / "plain")
    elif method != "bf16":
        source = quantize_source(source, method)
    seal_model(
        source,
        state / "models" / MODEL_ID,
        model_id=MODEL_ID,
        version=1,
        services=[LocalKMS(state / "keys" / KMS_KEY)],
        signer=LocalSigner.load(state / "keys" / SIGNING_KEY),
    )
    shutil.rmtree(state / "plain", ignore_errors=True)


class Server:
    """`strongroom serve` on one state folder."""

    def __init__(self, state: Path) -> None:
        self.state = state
        port = free_port()
        self.base = f"http://127.0.0.1:{port}"
        self.log = state.parent / f"{state.name}.log"
        config = Served(state).write_config()
        raw = yaml.safe_load(config.read_text())
        del raw["models"][1:]  # the embedding model would take a core
        config.write_text(yaml.safe_dump(raw))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server.cli", "serve", "--config", str(config),
                 "--port", str(port), "--state", str(state), "--prepare-embedded"],
                cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
            )  # fmt: skip

    def __enter__(self) -> Server:
        try:
            wait_until(self._ready, limit_s=400, pause_s=0.3)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)

    def _ready(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-3000:]}")
        try:
            return httpx.get(f"{self.base}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def answer(self) -> tuple[str, float]:
        """Return a streamed answer and its tokens a second, from the first token to the last."""
        body = {
            "model": MODEL_ID, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": NUM_TOKENS,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        key = read_env(self.state / "client.env")["OPENAI_API_KEY"]
        text, num_tokens, times = "", 0, []
        with httpx.stream(
            "POST", f"{self.base}/v1/chat/completions", json=body, timeout=120,
            headers={"authorization": f"Bearer {key}"},
        ) as response:  # fmt: skip
            response.raise_for_status()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
                for choice in event.get("choices", ()):
                    if piece := choice["delta"].get("content"):
                        text += piece
                        times.append(time.perf_counter())
        return text, (num_tokens - 1) / (times[-1] - times[0])

    def perplexity(self) -> float:
        """Over windows of the standard library's sources; asked of the engine itself, no route of ours tells logits."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.state / "models" / MODEL_ID / "tokenizer.json"))
        text = "".join(Path(str(__import__(name).__file__)).read_text() for name in STDLIB)
        ids = tokenizer.encode(text).ids
        starts = range(0, len(ids) - WINDOW_TOKENS, WINDOW_TOKENS)[:MAX_WINDOWS]
        transport = httpx.HTTPTransport(uds=str(engine_paths(self.state, MODEL_ID).socket))
        total, count = 0.0, 0
        with httpx.Client(transport=transport, base_url="http://engine", timeout=120) as client:
            for start in starts:
                window = ids[start : start + WINDOW_TOKENS]
                body = {"model": MODEL_ID, "prompt": window, "max_tokens": 1, "prompt_logprobs": 0}
                answer = client.post("/v1/completions", json=body)
                answer.raise_for_status()
                scores = answer.json()["choices"][0]["prompt_logprobs"]
                for token, score in zip(window[1:], scores[1:], strict=True):
                    total += score[str(token)]["logprob"]
                    count += 1
        return math.exp(-total / count)

    def worker_bytes(self) -> int:
        """Anonymous memory of the biggest process below the server: the engine's worker."""
        parents, sizes = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    lines = (entry / "status").read_text().splitlines()
                except OSError:
                    continue
                fields = dict(line.split(":", 1) for line in lines if ":" in line)
                parents[int(entry.name)] = int(fields["PPid"])
                sizes[int(entry.name)] = int(fields.get("RssAnon", "0 kB").split()[0]) * 1024
        below = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in below} - below:
            below |= more
        return max(sizes[pid] for pid in below)


def measure(state: Path, what: list[str]) -> dict[str, Any]:
    """One method, sealed already."""
    shards = list((state / "models" / MODEL_ID).glob("model-*.sealed"))
    row: dict[str, Any] = {"bytes": sum(path.stat().st_size for path in shards)}
    with Server(state) as server:
        answers = [server.answer() for _ in range(NUM_ANSWERS if "speed" in what else 1)]
        row["answer"] = answers[-1][0][:160]
        if "speed" in what:
            # The first answer also warms caches.
            row |= {"tokens_s": statistics.median(speed for _, speed in answers[1:]), "load": os.getloadavg()[0]}
        if "perplexity" in what:
            row["perplexity"] = server.perplexity()
            row["worker_bytes"] = server.worker_bytes()
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| method | size on disk, MB | worker's memory, MiB | tokens/s | perplexity |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in (n for n in METHOD_NAMES if n in rows):
        row = rows[name]
        cells = [f"{name} (packed by round to nearest)" if name in FORMS else name, f"{row['bytes'] / 1e6:.1f}"]
        cells.append(f"{row['worker_bytes'] / 2**20:.0f}" if "worker_bytes" in row else "")
        cells.append(f"{row['tokens_s']:.1f}" if "tokens_s" in row else "")
        cells.append(f"{row['perplexity']:.2f}" if "perplexity" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Seal what is missing, serve every method in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", choices=METHOD_NAMES)
    parser.add_argument("--measure", action="append", choices=("seal", "speed", "perplexity"), help="default: all")
    parser.add_argument(
        "--states", type=Path, help="where the sealed models are kept for another run (default: nowhere)"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seal", metavar="METHOD", help=argparse.SUPPRESS)
    parser.set_defaults(rounds=NUM_ANSWERS, threads=os.cpu_count(), cold=False)
    args = parser.parse_args(argv)
    if args.seal:
        seal(args.states / args.seal, args.seal)
        return 0
    what = args.measure or ["seal", "speed", "perplexity"]
    path = args.out / "sealed-quantized.json"
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        states = args.states or Path(scratch)
        for method in args.method or METHOD_NAMES:
            if not (states / method / "models" / MODEL_ID).exists():
                command = [sys.executable, "-m", "benchmarks.sealed.quantized", "--seal", method]
                subprocess.run([*command, "--states", str(states)], check=True, cwd=ROOT)
            if {"speed", "perplexity"} & set(what):
                rows[method] = rows.get(method, {}) | measure(states / method, what)
                args.out.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"setting": setting(args), "rows": rows}, indent=1) + "\n")
                print(f"{method}: {rows[method]}", flush=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
