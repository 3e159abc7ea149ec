"""`strongroom kms`: make a local key, print the least policy for a key service, try one out."""

from __future__ import annotations

import getpass
import json
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from server.errors import ConfigError, KMSDeniedError
from server.sealed.kms.base import DATA_KEY_BYTES, DataKey, KeyContext
from server.sealed.kms.local import create_key_file
from server.sealed.kms.uri import open_kms

if TYPE_CHECKING:
    import argparse

HELP: str = "make a local key, print the policy a key service needs, or try a key service out"
EPILOG: str = """examples:
  strongroom kms create-key /etc/strongroom/kms.key --passphrase
  strongroom kms policy openbao:transit/strongroom
  strongroom kms check pkcs11:token=hsm;object=strongroom"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the acts."""
    acts = parser.add_subparsers(dest="act", required=True, metavar="ACT")
    create = acts.add_parser("create-key", help="make a key file for a file: URI; it is never overwritten")
    create.add_argument("path", type=Path)
    create.add_argument("--passphrase", action="store_true", help="ask for a passphrase that the file is locked with")
    policy = acts.add_parser("policy", help="print the least policy: for servers, or for those who seal")
    policy.add_argument("uri")
    policy.add_argument("--sealing", action="store_true", help="for whoever seals: can wrap, can't open")
    check = acts.add_parser("check", help="wrap a random key, open it, and see a wrong context refused")
    check.add_argument("uri")
    check.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Do one act."""
    match args.act:
        case "create-key":
            create_key_file(args.path, passphrase=_ask_passphrase() if args.passphrase else None)
            print(f"The key is in {args.path}; keep a copy away from the models. Without it they never open again.")
        case "policy":
            print(least_policy(args.uri, sealing=args.sealing))
        case _:
            facts = check(args.uri)
            print(json.dumps(facts) if args.json else f"{facts['key_id']} answers; unwrap took {facts['unwrap_ms']} ms")
    return 0


def check(uri: str) -> dict[str, object]:
    """Use a key service once with a random key that is thrown away.

    Raises:
        KMSError: It refused or did not answer.
        ConfigError: It opened a key under a wrong context, so it must not be used.
    """
    service = open_kms(uri)
    context = KeyContext("strongroom-check", 1, "0" * 32)
    key = secrets.token_bytes(DATA_KEY_BYTES)
    recipient = service.wrap(DataKey(key), context)
    started = time.perf_counter()
    with service.unwrap(recipient, context) as opened:
        same = bytes(opened.reveal()) == key
    elapsed_ms = round((time.perf_counter() - started) * 1000, 1)
    try:
        service.unwrap(recipient, KeyContext("strongroom-check", 2, "0" * 32)).close()
    except KMSDeniedError:
        if same:
            return {"kms": service.mechanism, "key_id": service.key_id, "unwrap_ms": elapsed_ms}
    raise ConfigError(f"{uri} does not bind a key to its context, or gave another key back. Do not use it.")


def least_policy(uri: str, *, sealing: bool = False) -> str:
    """Return the least policy for a server, or for whoever seals, in the key service's own language.

    Raises:
        ConfigError: The URI's mechanism has no policies.
    """
    scheme, _, rest = uri.partition(":")
    if scheme == "openbao" and "/" in rest:
        mount, _, key = rest.strip("/").rpartition("/")
        path = f"{mount}/{'encrypt' if sealing else 'decrypt'}/{key}"
        return f'path "{path}" {{\n  capabilities = ["update"]\n}}'
    if scheme == "aws" and rest.startswith("arn:"):
        statement = {
            "Effect": "Allow",
            "Action": ["kms:Encrypt" if sealing else "kms:Decrypt"],
            "Resource": [rest],
            "Condition": {
                "StringEquals": {"kms:EncryptionContext:purpose": "weights"},
                "Null": {"kms:EncryptionContext:model_id": "false", "kms:EncryptionContext:version": "false"},
            },
        }
        return json.dumps({"Version": "2012-10-17", "Statement": [statement]}, indent=2)
    raise ConfigError(f"{uri}: only openbao: and aws: have policies to print.")


def _ask_passphrase() -> str:
    first = getpass.getpass("Passphrase: ")
    if len(first) < 12 or first != getpass.getpass("Again: "):
        raise ConfigError("The passphrases differ or have fewer than 12 characters. Nothing was made.")
    return first
