"""`strongroom floor`: the lowest version of a model that may start, shown or lowered for a roll back."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from server.commands.keys import open_recorder
from server.commands.unseal import authenticate, authorise
from server.policy.permissions import Permission
from server.settings import find_store_url
from server.store.database import Store
from server.store.floors import Floors

if TYPE_CHECKING:
    import argparse

HELP: str = "show or lower the lowest version of a model that may start"
EPILOG: str = (
    "example: ADMIN_API_KEY=… strongroom floor coder --lower-to 2 --state ./.strongroom\n"
    "A loaded version becomes the floor of its model by itself. To go back to an older one, lower the floor: the owner "
    "of ADMIN_API_KEY needs the permission admin:model:manage, and the act is on the audit log first."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `floor`."""
    parser.add_argument("model", help="the model's id")
    parser.add_argument("--lower-to", type=int, metavar="VERSION", help="the oldest version that may start from now on")
    parser.add_argument("--state", type=Path, default=Path(".strongroom"), help="state folder of the running server")
    parser.add_argument("--store", help="address of the store (default: the one that the server of STATE uses)")
    parser.add_argument("--policy", type=Path, default=Path("configs/policy"), help="policy folder")


def run(args: argparse.Namespace) -> int:
    """Show the floor, or lower it by permission and on record."""
    store = Store.open(find_store_url(args.state, args.store))
    try:
        floors = Floors(store, args.state)
        floor = floors.get(args.model)
        if args.lower_to is None:
            print(f"{args.model}: version {floor} or later" if floor else f"{args.model}: no floor; never loaded here")
            return 0
        principal = authenticate(args.state, store)
        authorise(principal, Permission.MODEL_MANAGE, args.policy)
        record = open_recorder(args.state)
        floors.lower_to(
            args.model,
            args.lower_to,
            seen=floor,
            by=principal.subject,
            record=functools.partial(record, by=principal.subject, key_id=principal.credential_id),
        )
    finally:
        store.close()
    print(f"{args.model}: version {args.lower_to} or later may start")
    return 0
