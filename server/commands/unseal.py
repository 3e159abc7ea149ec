"""`strongroom unseal`: a sealed model back to plain files, by permission and on record."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from server.audit.tags import Event
from server.auth.api_key import KeyRing
from server.auth.pepper import load_pepper
from server.commands.keys import open_recorder
from server.commands.seal import progress_bar
from server.errors import PermissionDeniedError
from server.policy.cedar import PolicySet, Question
from server.policy.permissions import Permission, covers
from server.sealed.agent import KeyAgent
from server.sealed.kms.uri import open_kms
from server.sealed.model import open_sealed
from server.sealed.signature import TrustedSigner
from server.sealed.unseal import check_target, unseal
from server.settings import find_store_url
from server.store.database import Store
from server.store.floors import Floors
from server.store.keys import list_keys

if TYPE_CHECKING:
    import argparse

    from server.types import Principal

HELP: str = "write a sealed model back as plain files, onto a tmpfs"
EPILOG: str = (
    "example: ADMIN_API_KEY=… strongroom unseal ./models/coder /dev/shm/coder --kms file:/etc/strongroom/kms.key "
    "--signer /etc/strongroom/sign.pem.pub --state ./.strongroom\n"
    "The owner of ADMIN_API_KEY needs the permission weights:model:unseal; the act is on the audit log first."
)
KEY_ENV = "ADMIN_API_KEY"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `unseal`."""
    parser.add_argument("model", type=Path, help="folder of the sealed model")
    parser.add_argument("out", type=Path, help="new folder on a tmpfs")
    parser.add_argument("--kms", action="append", required=True, metavar="URI", help="key service that opens it")
    parser.add_argument("--signer", action="append", type=Path, default=[], metavar="PUB", help="trusted signer")
    parser.add_argument("--allow-unsigned", action="store_true", help="go on without a trusted signature")
    parser.add_argument("--force", action="store_true", help="write plaintext to a disk")
    parser.add_argument("--state", type=Path, default=Path(".strongroom"), help="state folder of the running server")
    parser.add_argument("--store", help="address of the store (default: the one that the server of STATE uses)")
    parser.add_argument("--policy", type=Path, default=Path("configs/policy"), help="policy folder")


def run(args: argparse.Namespace) -> int:
    """Check target, permission and log; then unseal."""
    check_target(args.out, force=args.force)
    trusted = [TrustedSigner.load(path) for path in args.signer]
    store = Store.open(find_store_url(args.state, args.store))
    try:
        principal = authenticate(args.state, store)
        core = open_sealed(args.model, trusted_signers=trusted, allow_unsigned=args.allow_unsigned).core
        floor = Floors(store, args.state).get(core.model_id)
    finally:
        store.close()
    record = open_recorder(args.state)
    agent = KeyAgent(
        services=[open_kms(uri) for uri in args.kms],
        trusted_signers=trusted,
        record=record,
        allow_unsigned=args.allow_unsigned,
    )
    authorise(principal, Permission.UNSEAL, args.policy, model_id=core.model_id)
    record(
        Event.MODEL_UNSEALED,
        by=principal.subject,
        key_id=principal.credential_id,
        model=core.model_id,
        version=core.version,
        seal_id=core.seal_id,
        forced=args.force,
    )
    release = agent.release(args.model, floor=floor, model_id=core.model_id)
    with release.data_key as data_key, progress_bar() as bar:
        task = bar.add_task("unsealing", total=sum(s.header.payload_bytes for s in release.model.weights))
        unseal(release.model, data_key.reveal(), args.out, progress=lambda num_bytes: bar.advance(task, num_bytes))
    print(f"{args.out} holds the model in the clear; remove it when you are done")
    return 0


def authenticate(state: Path, store: Store) -> Principal:
    """Return the owner of the API key in `ADMIN_API_KEY`.

    Raises:
        AuthenticationError: There is none, or it is unknown, expired or revoked.
    """
    with store.read() as connection:
        rows = list_keys(connection)
    ring = KeyRing(load_pepper(state / "keys" / "pepper"))
    ring.load(rows)
    return ring.authenticate(os.environ.get(KEY_ENV, ""))


def authorise(principal: Principal, action: Permission, policy: Path, *, model_id: str = "") -> None:
    """Ask the policies that the server decides by.

    Raises:
        PermissionDeniedError: They do not permit it, or the key's scopes do not cover it.
    """
    question = Question(
        subject=principal.subject,
        tenant=principal.tenant,
        groups=principal.groups,
        scopes=principal.scopes,
        method=principal.method,
        action=action,
        model=model_id,
    )
    decision = PolicySet.load(policy).ask(question)
    if not decision.allowed or not covers(principal.scopes, action):
        what = f"{action} on {model_id}" if model_id else str(action)
        raise PermissionDeniedError(f"{principal.subject} may not do {what}: {decision.reason}.")
