"""Sealed against plain safetensors and encrypted tensorizer: time to fill parameters, memory, sealing speed.

`python -m benchmarks.sealed.load` (`strongroom bench load`). All variants run interleaved in one process, round by
round, the first round dropped. Each fills parameters of two kinds: `new` ones, allocated and never written to, as an
engine has them when it loads its weights, so that their page faults are part of the load; and `used` ones, written to
before, where only reading and copying (or decrypting) is left. Peak memory is taken in a process of its own each. The
page cache is warm unless `--cold`, which drops the files' pages before each load and reads them without loading too.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib.util
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from cryptography.hazmat.primitives.asymmetric import ec
from safetensors.torch import load_file, save_file

from benchmarks.sealed.picture import bars
from server.engine.vllm.lazy import DTYPES, SealedTensor, storages
from server.sealed.agent import KeyAgent
from server.sealed.format import Suite
from server.sealed.kms.local import LocalKMS, create_key_file
from server.sealed.populate import Populated
from server.sealed.seal import seal_model
from server.sealed.shard import ShardReader
from server.sealed.signature import LocalSigner, TrustedSigner

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 1 << 30
LARGE, SMALL = (4096, 4096), (4096,)
KINDS = ("new", "used")
READ_ONLY = "read the plain file, no load"


def make(folder: Path, num_matrices: int) -> dict[str, Any]:
    """A plain model of bf16 matrices and norms, and its sealed and tensorized forms."""
    torch.manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(LARGE).bfloat16() for i in range(num_matrices)}
    tensors |= {f"layers.{i}.norm": torch.randn(SMALL).bfloat16() for i in range(num_matrices)}
    plain = folder / "plain"
    plain.mkdir()
    save_file(tensors, plain / "model.safetensors")
    (plain / "config.json").write_text('{"dtype": "bfloat16"}')
    create_key_file(folder / "key")
    signer = LocalSigner(ec.generate_private_key(ec.SECP256R1()))
    for suite in Suite:
        seal_model(
            plain, folder / suite.value, model_id="bench", version=1,
            services=[LocalKMS(folder / "key")], signer=signer, suite=suite,
        )  # fmt: skip
    num_bytes = sum(t.numel() * 2 for t in tensors.values())
    return {"folder": folder, "signer": signer, "num_bytes": num_bytes}


def parameters(model: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Destination tensors that exist and are touched."""
    loaded = load_file(model["folder"] / "plain" / "model.safetensors")
    return {name: torch.ones_like(t) for name, t in loaded.items()}


def load_plain(model: dict[str, Any], params: dict[str, torch.Tensor]) -> None:
    """Safetensors, mapped and copied, as vLLM does."""
    for name, tensor in load_file(model["folder"] / "plain" / "model.safetensors").items():
        params[name].copy_(tensor)


def sealed_loader(suite: Suite, threads: int) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    """The whole way: signature, tags, key service, decryption into the parameters."""

    def load(model: dict[str, Any], params: dict[str, torch.Tensor]) -> None:
        path = model["folder"] / suite.value
        agent = KeyAgent(
            services=[LocalKMS(model["folder"] / "key")],
            trusted_signers=[TrustedSigner.of(model["signer"].public_key)],
            record=lambda _tag, **_fields: None,
        )
        release = agent.release(path)
        pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None
        with release.data_key as data_key, Populated(storages(params.values()), pool):
            for shard in release.model.weights:
                with ShardReader(
                    path, shard, release.model.core, data_key.reveal(), pool=pool, threads=threads
                ) as reader:
                    for entry in reader.index.entries:
                        params[entry.name].copy_(SealedTensor(reader, entry.name, 0, entry.shape, DTYPES[entry.dtype]))
        if pool is not None:
            pool.shutdown()

    return load


def write_tensorized(model: dict[str, Any]) -> None:
    from tensorizer import EncryptionParams, TensorSerializer

    params = EncryptionParams.random()
    model["tensorizer_key"] = params.key
    serializer = TensorSerializer(str(model["folder"] / "model.tensors"), encryption=params)
    serializer.write_state_dict(load_file(model["folder"] / "plain" / "model.safetensors"))
    serializer.close()


def load_tensorized(model: dict[str, Any], params: dict[str, torch.Tensor]) -> None:
    from tensorizer import DecryptionParams, TensorDeserializer

    encryption = DecryptionParams.from_key(model["tensorizer_key"])
    loaded = TensorDeserializer(str(model["folder"] / "model.tensors"), device="cpu", encryption=encryption)
    for name in loaded.keys():  # noqa: SIM118 - not a dict
        params[name].copy_(loaded[name])
    loaded.close()


def read_only(model: dict[str, Any], params: dict[str, torch.Tensor]) -> None:
    """Nothing but reading the plain file: what the disk delivers."""
    del params
    buffer = bytearray(1 << 20)
    with (model["folder"] / "plain" / "model.safetensors").open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def variants(max_threads: int, *, cold: bool) -> dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], None]]:
    found: dict[str, Callable[[dict[str, Any], dict[str, torch.Tensor]], None]] = {"safetensors": load_plain}
    for threads in range(1, max_threads + 1):
        found[f"sealed aes-256-gcm, {threads} threads"] = sealed_loader(Suite.AES_256_GCM, threads)
    found[f"sealed chacha20-poly1305, {max_threads} threads"] = sealed_loader(Suite.CHACHA20_POLY1305, max_threads)
    if has_tensorizer():
        found["tensorizer encrypted"] = load_tensorized
    if cold:
        found[READ_ONLY] = read_only
    return found


def has_tensorizer() -> bool:
    """It is no dependency of ours: `pip install tensorizer` for the comparison."""
    return importlib.util.find_spec("tensorizer") is not None


def drop_pages(folder: Path) -> None:
    for path in (p for p in folder.rglob("*") if p.is_file()):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def measure(model: dict[str, Any], rounds: int, max_threads: int, *, cold: bool) -> dict[str, dict[str, list[float]]]:
    """Seconds by kind of parameters and variant, a value a round."""
    used = parameters(model)
    expected = {n: t.clone() for n, t in load_file(model["folder"] / "plain" / "model.safetensors").items()}
    loads = list(variants(max_threads, cold=cold).items())
    seconds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name, _ in loads} for kind in KINDS}
    for turn in range(rounds + 1):
        # In another order each round: the first may be who touches memory that a hypervisor had taken back, and who
        # comes after a load in large pages finds them ready.
        for name, load in random.Random(turn).sample(loads, len(loads)):
            for kind in KINDS:
                if kind == "used":
                    params = used
                    for param in params.values():
                        param.fill_(1)
                else:
                    params = {n: torch.empty_like(t) for n, t in used.items()}
                if cold:
                    drop_pages(model["folder"])
                started = time.perf_counter()
                load(model, params)
                elapsed = time.perf_counter() - started
                if turn > 0:
                    seconds[kind][name].append(elapsed)
                elif name != READ_ONLY and not all(torch.equal(params[n], expected[n]) for n in expected):
                    raise RuntimeError(f"{name} loaded other values")
                del params
                gc.collect()
    return seconds


def measure_seal(model: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """Sealing beside copy, fsync and SHA-256 of the same bytes."""
    source = model["folder"] / "plain" / "model.safetensors"
    out, copy = model["folder"] / "out", model["folder"] / "copy"
    seconds: dict[str, list[float]] = {"copy + fsync + sha256": [], "seal": []}
    for _ in range(rounds):
        started = time.perf_counter()
        shutil.copyfile(source, copy)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
            hashlib.file_digest(file, "sha256")
        seconds["copy + fsync + sha256"].append(time.perf_counter() - started)
        copy.unlink()
        started = time.perf_counter()
        seal_model(
            source.parent, out, model_id="bench", version=1,
            services=[LocalKMS(model["folder"] / "key")], signer=model["signer"],
        )  # fmt: skip
        seconds["seal"].append(time.perf_counter() - started)
        shutil.rmtree(out)
    return seconds


def peak_bytes(folder: Path, name: str, num_matrices: int) -> int:
    """Peak resident memory of one load, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sealed.load", "--peak", name, "--folder", str(folder),
         "--matrices", str(num_matrices)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(done.stdout.strip().splitlines()[-1])


def print_peak(folder: Path, name: str, num_matrices: int) -> None:
    """Fill parameters once and print the peak."""
    facts = json.loads((folder / "facts.json").read_text())
    private = ec.derive_private_key(1, ec.SECP256R1())
    model: dict[str, Any] = {"folder": folder, "signer": LocalSigner(private)}
    if facts.get("tensorizer_key"):
        model["tensorizer_key"] = bytes.fromhex(facts["tensorizer_key"])
    params = {f"layers.{i}.weight": torch.ones(LARGE, dtype=torch.bfloat16) for i in range(num_matrices)}
    params |= {f"layers.{i}.norm": torch.ones(SMALL, dtype=torch.bfloat16) for i in range(num_matrices)}
    threads = 2 if "2 threads" in name else 1
    if name == "safetensors":
        load_plain(model, params)
    elif name == "tensorizer encrypted":
        load_tensorized(model, params)
    else:
        suite = Suite.AES_256_GCM if "aes" in name else Suite.CHACHA20_POLY1305
        model["signer"] = Stranger(facts["signer"])
        sealed_loader(suite, threads)(model, params)
    # Not getrusage: its maximum is inherited from the parent over fork and exec.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) * 1024)


class Stranger:
    """A signer of whom only the public key is known."""

    def __init__(self, pem: str) -> None:
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        self.public_key = load_pem_public_key(pem.encode())


def main(argv: list[str] | None = None) -> int:
    """Measure, print a table, and write JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, action="append", help="32 MiB each; several sizes (default 8 and 48)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every load")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peak:
        print_peak(args.folder, args.peak, args.matrices[0])
        return 0
    rows: list[dict[str, Any]] = []
    stem = args.out
    for num_matrices in args.matrices or [8, 48]:
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            rows.append(one_size(Path(scratch), num_matrices, args))
        stem = write(args, rows)
    print(f"written: {stem}.json, {stem}.svg")
    return 0


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> Path:
    """Write what there is so far: a run that is cut short keeps its sizes."""
    result = {"setting": setting(args), "sizes": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    stem: Path = args.out / ("sealed-load-cold" if args.cold else "sealed-load")
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    largest = rows[-1]
    stem.with_suffix(".svg").write_text(
        bars(
            f"Loading {largest['gib']:.2f} GiB into new and used parameters, GiB/s (median, 20th to 80th percentile)",
            {f"{name}: {kind}": load["gib_s"] for kind in KINDS for name, load in largest["load"][kind].items()},
        )
    )
    return stem


def one_size(folder: Path, num_matrices: int, args: argparse.Namespace) -> dict[str, Any]:
    model = make(folder, num_matrices)
    if has_tensorizer():
        write_tensorized(model)
    else:
        print("tensorizer is not installed: no comparison with it (pip install tensorizer)")
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = model["signer"].public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    (folder / "facts.json").write_text(
        json.dumps({"signer": pem, "tensorizer_key": model.get("tensorizer_key", b"").hex()})
    )
    gib = model["num_bytes"] / GIB
    loads = measure(model, args.rounds, args.threads, cold=args.cold)
    row: dict[str, Any] = {"gib": gib, "load": {kind: {} for kind in KINDS}, "peak_rss_bytes": {}, "seal": {}}
    for kind in KINDS:
        print(f"{gib:.2f} GiB into {kind} parameters, {'cold' if args.cold else 'warm'} page cache")
        for name, seconds in loads[kind].items():
            # The ratio of each round's own baseline: neighbours disturb both of a round alike.
            ratios = [plain / own for plain, own in zip(loads[kind]["safetensors"], seconds, strict=True)]
            row["load"][kind][name] = {
                "seconds": seconds,
                "gib_s": percentiles([gib / s for s in seconds]),
                "times_safetensors": percentiles(ratios),
            }
            print(
                f"  {name:38} {gib / statistics.median(seconds):6.2f} GiB/s  "
                f"{statistics.median(ratios):5.2f} x safetensors"
            )
    for name in loads["new"]:
        if name != READ_ONLY:
            row["peak_rss_bytes"][name] = peak_bytes(folder, name, num_matrices)
            print(f"  {name:38} peak {row['peak_rss_bytes'][name] / 2**20:7.0f} MiB")
    sealing = measure_seal(model, max(3, args.rounds // 3))
    for name, seconds in sealing.items():
        row["seal"][name] = {"seconds": seconds, "gib_s": percentiles([gib / s for s in seconds])}
        print(f"  {name:38} {gib / statistics.median(seconds):6.2f} GiB/s")
    row["seal_of_copy"] = statistics.median(sealing["copy + fsync + sha256"]) / statistics.median(sealing["seal"])
    return row


def percentiles(values: list[float]) -> list[float]:
    """20th, 50th and 80th."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.2, 0.5, 0.8)]


def setting(args: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    names = ["torch", "safetensors", "cryptography", *(["tensorizer"] if has_tensorizer() else [])]
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "commit": commit.stdout.strip(),
        "rounds": args.rounds,
        "threads": args.threads,
        "page_cache": "cold" if args.cold else "warm",
    }


if __name__ == "__main__":
    sys.exit(main())
