"""`strongroom seal`: a model folder to a sealed model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from server.audit.tags import Event
from server.commands.keys import open_recorder
from server.sealed.format import Suite
from server.sealed.kms.local import create_key_file
from server.sealed.kms.uri import open_kms
from server.sealed.seal import seal_model
from server.sealed.signature import LocalSigner, create_signing_key, public_path
from server.sealed.source import load_source

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from server.sealed.signature import Signer
    from server.sealed.source import Source

HELP: str = "seal a model folder under one or more key services"
_PKCS11 = "pkcs11:"
EPILOG: str = (
    "example: strongroom seal ./Qwen3-Coder ./models/coder --model-id coder --model-version 3 "
    "--kms file:/etc/strongroom/kms.key --sign /etc/strongroom/sign.pem"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `seal`."""
    parser.add_argument("model_dir", type=Path, help="folder with safetensors, config and tokenizer")
    parser.add_argument("out", type=Path, help="new folder for the sealed model")
    parser.add_argument("--kms", action="append", required=True, metavar="URI", help="key service; may be repeated")
    parser.add_argument("--model-id", help="name that policy and key services know it by (default: the folder's name)")
    parser.add_argument("--model-version", type=int, default=1, help="higher than every earlier version (default: 1)")
    parser.add_argument("--suite", choices=[s.value for s in Suite], default=Suite.AES_256_GCM.value)
    parser.add_argument("--seal-files", action="store_true", help="seal config and tokenizer too")
    parser.add_argument("--sign", metavar="KEY", help="PEM private key (ECDSA) that signs, or pkcs11:token=T;object=K")
    parser.add_argument("--create-key", action="store_true", help="make the file: key and the signing key if missing")
    parser.add_argument("--licence", default="", metavar="SPDX", help="licence of the model")
    parser.add_argument("--lineage", action="append", default=[], metavar="NAME=VALUE", help="where it came from")
    parser.add_argument("--state", type=Path, help="put the act on the log of the server in this folder")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Seal and print what was made."""
    return seal_folder(args, lambda source: source)


def seal_folder(args: argparse.Namespace, change: Callable[[Source], Source]) -> int:
    """Load the folder, change it in memory, seal it and print what was made; also the body of `quantize`."""
    if args.create_key:
        _create_missing_keys(args)
    services = [open_kms(uri) for uri in args.kms]
    signer = _load_signer(args.sign) if args.sign is not None else None
    source = change(load_source(args.model_dir))
    with progress_bar() as bar:
        task = bar.add_task("sealing", total=source.num_bytes)
        core = seal_model(
            source,
            args.out,
            model_id=args.model_id or args.out.name.lower(),
            version=args.model_version,
            services=services,
            signer=signer,
            suite=Suite(args.suite),
            seal_files=args.seal_files,
            lineage=dict(item.partition("=")[::2] for item in args.lineage),
            licence=args.licence,
            progress=lambda num_bytes: bar.advance(task, num_bytes),
        )
    if args.state is not None:
        recipients = [f"{service.mechanism}:{service.key_id}" for service in services]
        open_recorder(args.state)(
            Event.MODEL_SEALED,
            model=core.model_id,
            version=core.version,
            seal_id=core.seal_id,
            recipients=recipients,
            signed=signer is not None,
        )
    if args.json:
        print(json.dumps({"model_id": core.model_id, "version": core.version, "seal_id": core.seal_id}))
    else:
        print(f"sealed {core.model_id} version {core.version} into {args.out} ({source.num_bytes} bytes of tensors)")
        if signer is None:
            print("not signed: it will start only where the configuration allows unsigned models", file=sys.stderr)
    return 0


def progress_bar() -> Progress:
    """Return a bar on stderr that shows itself on a terminal only."""
    from rich.console import Console

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress("{task.description}", *columns, console=console, disable=not console.is_terminal, transient=True)


def _create_missing_keys(args: argparse.Namespace) -> None:
    for uri in args.kms:
        path = Path(uri.removeprefix("file:").removeprefix("//"))
        if uri.startswith("file:") and not path.exists():
            create_key_file(path)
    if args.sign is not None and not args.sign.startswith(_PKCS11) and not Path(args.sign).exists():
        create_signing_key(Path(args.sign))
        print(
            f"new signing key; give {public_path(Path(args.sign))} to the servers as a trusted signer", file=sys.stderr
        )


def _load_signer(key: str) -> Signer:
    if key.startswith(_PKCS11):
        from server.sealed.kms.pkcs11 import signer_from_environment

        return signer_from_environment(key.removeprefix(_PKCS11))
    return LocalSigner.load(Path(key))
