"""`strongroom rewrap`: rotate the key services of a sealed model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from server.commands.keys import open_recorder
from server.sealed.kms.uri import open_kms
from server.sealed.model import open_sealed
from server.sealed.rewrap import rewrap
from server.sealed.signature import TrustedSigner

if TYPE_CHECKING:
    import argparse

HELP: str = "wrap a sealed model's key for other key services, without touching its payload"
EPILOG: str = (
    "example: strongroom rewrap ./models/coder --kms file:/etc/strongroom/kms.key "
    "--to openbao:transit/strongroom --signer /etc/strongroom/sign.pem.pub"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `rewrap`."""
    parser.add_argument("model", type=Path, help="folder of the sealed model")
    parser.add_argument("--kms", action="append", required=True, metavar="URI", help="key service that opens it now")
    parser.add_argument("--to", action="append", required=True, metavar="URI", help="key service to wrap it for")
    parser.add_argument("--keep", action="store_true", help="keep the recipients it has")
    parser.add_argument("--signer", action="append", type=Path, default=[], metavar="PUB", help="trusted signer")
    parser.add_argument("--allow-unsigned", action="store_true", help="rewrap a model without a trusted signature")
    parser.add_argument("--state", type=Path, help="put the release of the key on the log of the server in this folder")
    parser.add_argument("--json", action="store_true", help="print the recipients as JSON")


def run(args: argparse.Namespace) -> int:
    """Rewrap and print who can open the model now."""
    trusted = [TrustedSigner.load(path) for path in args.signer]
    model = open_sealed(args.model, trusted_signers=trusted, allow_unsigned=args.allow_unsigned)
    services = [open_kms(uri) for uri in args.kms]
    record = open_recorder(args.state) if args.state is not None else None
    to = [open_kms(uri) for uri in args.to]
    recipients = rewrap(model, services=services, to=to, keep=args.keep, record=record)
    if record is None:
        print("the release of the key is on the key service's log only; --state names a server's", file=sys.stderr)
    names = [f"{r.kms}:{r.key_id}" for r in recipients]
    print(json.dumps({"recipients": names}) if args.json else "\n".join(names))
    return 0
