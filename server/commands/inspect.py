"""`strongroom inspect`: what a sealed model says of itself; no key is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.commands.seal import progress_bar
from server.errors import SealError
from server.sealed.format import SIGNATURE_NAME
from server.sealed.model import SealedModel, open_sealed, verify_bytes
from server.sealed.signature import TrustedSigner, parse_unverified

if TYPE_CHECKING:
    import argparse

HELP: str = "show and verify a sealed model, without its key"
EPILOG: str = "example: strongroom inspect ./models/coder --verify --signer /etc/strongroom/sign.pem.pub"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `inspect`."""
    parser.add_argument("model", type=Path, help="folder of the sealed model")
    parser.add_argument("--verify", action="store_true", help="demand a signature by --signer and hash every byte")
    parser.add_argument(
        "--signer", action="append", type=Path, default=[], metavar="PUB", help="trusted signer's PEM public key"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    """Inspect; exit code 0 only if everything that was asked for holds."""
    trusted = [TrustedSigner.load(path) for path in args.signer]
    try:
        model = open_sealed(args.model, trusted_signers=trusted, allow_unsigned=not args.verify)
        if args.verify:
            with progress_bar() as bar:
                task = bar.add_task("hashing", total=sum(s.record.num_bytes for s in model.shards))
                verify_bytes(model, progress=lambda num_bytes: bar.advance(task, num_bytes))
    except SealError as err:
        # Whoever holds the files may know what is wrong; only the server's public answer is one for all.
        print(json.dumps({"accepted": False, "kind": err.kind, "detail": err.detail}) if args.json else err.detail)
        return 1
    facts = describe(model, verified=args.verify)
    if args.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:14} {value if not isinstance(value, list) else ', '.join(map(str, value))}")
    return 0


def describe(model: SealedModel, *, verified: bool) -> dict[str, Any]:
    """Return the facts that need no key, JSON-ready."""
    core = model.core
    claimed = None
    if model.signer is None and (model.path / SIGNATURE_NAME).exists():
        claimed = parse_unverified((model.path / SIGNATURE_NAME).read_bytes()).signer
    return {
        "accepted": True,
        "model_id": core.model_id,
        "version": core.version,
        "seal_id": core.seal_id,
        "digest": model.core_digest.hex(),
        "suite": core.suite.value,
        "dtype": core.dtype,
        "quantization": core.quantization,
        "shards": [s.record.name for s in model.shards],
        "bytes": sum(s.record.num_bytes for s in model.shards),
        "chunks": sum(s.header.num_chunks for s in model.shards),
        "files": [f.name for f in model.manifest.files],
        "recipients": [f"{r.kms}:{r.key_id}" for r in model.recipients],
        "signer": model.signer,
        "claims_signer": claimed,
        "licence": model.manifest.licence,
        "lineage": [f"{k}={v}" for k, v in sorted(model.manifest.lineage.items())],
        "bytes_verified": verified,
    }
