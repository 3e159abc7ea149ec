"""Time that vLLM spends in `load_weights`, sealed against plain safetensors, each load in a process of its own.

`python -m benchmarks.sealed.in_vllm`: the embedded model through vLLM's own model classes, in turn. An engine loads
once, into memory that nobody has touched; a second load in a process finds the first one's. Before that both are
loaded in one process and all parameters compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from benchmarks.sealed.load import setting
from server.sealed.agent import KeyAgent
from server.sealed.embedded import load_embedded
from server.sealed.kms.local import LocalKMS, create_key_file
from server.sealed.quantize import quantize_source
from server.sealed.seal import seal_model
from server.sealed.signature import LocalSigner, TrustedSigner, create_signing_key
from server.sealed.unseal import unseal
from tests.engine.sealed_loading import run_jobs


def make_job(folder: Path, method: str) -> dict[str, object]:
    """Seal the embedded model and lay its plain twin beside it."""
    key, pem = folder / f"{method}.key", folder / f"{method}.pem"
    create_key_file(key)
    create_signing_key(pem)
    signer = LocalSigner.load(pem)
    source = load_embedded()
    sealed, plain = folder / f"{method}-sealed", folder / f"{method}-plain"
    seal_model(
        source if method == "bf16" else quantize_source(source, method),
        sealed,
        model_id="smollm2",
        version=1,
        services=[LocalKMS(key)],
        signer=signer,
    )
    agent = KeyAgent(
        services=[LocalKMS(key)],
        trusted_signers=[TrustedSigner.of(signer.public_key)],
        record=lambda _tag, **_fields: None,
    )
    release = agent.release(sealed)
    unseal(release.model, release.data_key.reveal(), plain)
    public = folder / f"{method}.pub"
    public.write_bytes(signer.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return {
        "name": method, "plain": str(plain), "sealed": str(sealed), "key": str(key), "signer": str(public),
    }  # fmt: skip


def ratios(method: str, seconds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return and print the median of the rounds' ratios, for all weights and by what becomes of them."""
    found = {}
    for kind in ("all", "whole", "fused"):
        sealed, plain = ([turn[kind] for turn in seconds[way]] for way in ("sealed", "plain"))
        if not all(plain):
            continue  # this loader does not tell them apart
        found[kind] = statistics.median(s / p for s, p in zip(sealed, plain, strict=True))
        print(
            f"{method}, {kind}: plain {statistics.median(plain) * 1000:.1f} ms, "
            f"sealed {statistics.median(sealed) * 1000:.1f} ms, {found[kind]:.3f} of plain"
        )
    return {"sealed_of_plain": found}


def main(argv: list[str] | None = None) -> int:
    """Measure and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--method", action="append", help="bf16 (default), or a method of quantize")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.set_defaults(threads=os.cpu_count(), cold=False)
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for method in args.method or ["bf16"]:
            job = make_job(Path(scratch), method)
            (both,) = run_jobs([job], Path(scratch))
            row = {"name": method, "num_parameters": both["num_parameters"], "equal": both["equal"]}
            print(f"{method}: {row['num_parameters']} parameters equal: {row['equal']}", flush=True)
            seconds: dict[str, list[dict[str, float]]] = {"plain": [], "sealed": []}
            for turn in range(args.rounds):
                for way in ("sealed", "plain") if turn % 2 == 0 else ("plain", "sealed"):
                    (one,) = run_jobs([job | {"ways": [way]}], Path(scratch))
                    seconds[way] += one[f"{way}_s"]
                print(f"round {turn + 1} of {args.rounds}", end="\r", flush=True)
            rows.append(row | {f"{way}_s": values for way, values in seconds.items()} | ratios(method, seconds))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sealed-in-vllm.json").write_text(json.dumps({"setting": setting(args), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
