"""`strongroom keys`: API keys are made, listed, rotated and revoked."""

from __future__ import annotations

import contextlib
import csv
import getpass
import json
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.audit.client import SyncAuditClient
from server.audit.entry import new_entry
from server.auth.api_key import find_keys
from server.auth.key_admin import KeyAdmin, KeySpec, describe_key
from server.auth.pepper import load_pepper, new_pepper, new_secret, rotate_pepper
from server.errors import NotFoundError, RequestError
from server.folders import make_runtime_dir
from server.policy.permissions import parse_scope
from server.settings import find_store_url
from server.store.database import Store

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from server.auth.key_admin import Record
    from server.store.keys import KeyRow

HELP = "Make, list, show, rotate, revoke and import API keys."
EPILOG = """examples:
  strongroom keys create --subject ana --tenant acme --group developers --expires 90d
  strongroom keys list --json
  strongroom keys rotate k3x9qz0a1b2c --overlap 24h
  strongroom keys revoke k3x9qz0a1b2c --reason "left the company"
  strongroom keys revoke --leaked - < found-key.txt

Every change is put on the audit log first; without its writer (strongroom serve) no key is changed."""
DEFAULT_SCOPES = ("model:*", "guard:text:scan", "audit:receipt:read")
_DURATION = re.compile(r"([0-9]{1,6})([smhdw])", re.ASCII)
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every act."""
    acts = parser.add_subparsers(dest="act", required=True, metavar="ACT")

    def act(name: str, told: str) -> argparse.ArgumentParser:
        added = acts.add_parser(name, help=told, description=told)
        added.add_argument("--state", type=Path, default=Path(".strongroom"), help="state folder (default .strongroom)")
        added.add_argument("--store", help="address of the store (default: the one that the server of STATE uses)")
        added.add_argument("--json", action="store_true", help="print JSON")
        return added

    act("init", "Make the secrets that keys are stored under and tenants are salted with; those there stay.")
    act("rotate-pepper", "Add a pepper for new keys; older keys stay valid until they are rotated.")
    create = act("create", "Make a key and print it, once.")
    _add_spec(create)
    listed = act("list", "List keys; the keys themselves are not kept and can't be shown.")
    listed.add_argument("--tenant", help="only this tenant's")
    shown = act("show", "Show what is kept of one key.")
    shown.add_argument("id")
    rotated = act("rotate", "Make a successor with the same rights; the old key ends after the overlap.")
    rotated.add_argument("id")
    rotated.add_argument("--overlap", default="24h", help="how long the old key still works (default 24h)")
    revoked = act("revoke", "End a key now, everywhere, running streams included.")
    revoked.add_argument("id", nargs="?")
    revoked.add_argument("--digest", help="the key's digest, as 'show' prints it, instead of its id")
    revoked.add_argument("--leaked", metavar="FILE", help="a file in which keys were found, or - for standard input")
    revoked.add_argument("--reason", default="revoked by an operator")
    imported = act(
        "import", "Take over keys that callers hold already, from a CSV file: key,subject,tenant,groups,scopes."
    )
    imported.add_argument("file", help="CSV file with a header, or - for standard input; names in a cell end with ;")


def run(args: argparse.Namespace) -> int:
    """Do one act."""
    keys_dir = args.state / "keys"
    if args.act == "init":
        keys_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        new_pepper(keys_dir / "pepper")
        new_secret(keys_dir / "cache-salt")
        print(f"The secrets are in {keys_dir}; keep a copy where the keys' backup is.")
        return 0
    if args.act == "rotate-pepper":
        open_recorder(args.state)("admin:settings:changed", by=_operator(), setting="pepper")
        print(f"New keys are stored under pepper {rotate_pepper(keys_dir / 'pepper')} from the next start on.")
        return 0
    pepper = load_pepper(keys_dir / "pepper")
    store = Store.open(find_store_url(args.state, args.store))
    try:
        admin = KeyAdmin(store, pepper, record=open_recorder(args.state), by=_operator())
        return _act(args, admin, store.clock())
    finally:
        store.close()


def open_recorder(state: Path) -> Record:
    """Return what puts an act on the log of `state`; it connects when it is first used."""
    client = SyncAuditClient(make_runtime_dir(state.absolute()) / "audit.sock")

    def record(event: str, **fields: Any) -> None:
        client.append(new_entry(event, **fields))

    return record


def _operator() -> str:
    """Return who runs the command; a container's user may have no name."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return f"cli:uid{os.getuid()}"


def _act(args: argparse.Namespace, admin: KeyAdmin, now_s: float) -> int:
    match args.act:
        case "create":
            row, text = admin.create(_spec(args, now_s))
            _print_new(args, row, text.reveal(), now_s)
        case "rotate":
            row, text = admin.rotate(args.id, overlap_s=parse_duration_s(args.overlap))
            _print_new(args, row, text.reveal(), now_s)
        case "revoke":
            _print_rows(args, _revoke(args, admin), now_s)
        case "show":
            print(json.dumps(describe_key(admin.get(args.id), now_s), indent=2))
        case "import":
            _print_rows(args, admin.import_keys(_read_import(args.file)), now_s)
        case _:
            _print_rows(args, admin.list(tenant=args.tenant), now_s)
    return 0


def _add_spec(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--subject", required=True, help="whose key: a person or a robot")
    parser.add_argument("--tenant", default="default", help="whose data and cache it shares (default: default)")
    parser.add_argument("--group", action="append", default=[], metavar="GROUP", help="a group that policies name")
    parser.add_argument(
        "--scope",
        action="append",
        default=[],
        metavar="SCOPE",
        help=f"what the key may be used for at most (default: {' '.join(DEFAULT_SCOPES)})",
    )
    parser.add_argument("--expires", help="when it ends: 90d, 12h, or 2027-01-31 (default: never)")
    parser.add_argument("--note", default="", help="what it is for")


def _spec(args: argparse.Namespace, now_s: float) -> KeySpec:
    expires_at_s = None if args.expires is None else parse_expiry_s(args.expires, now_s)
    scopes = _parse_scopes(args.scope or DEFAULT_SCOPES)
    return KeySpec(args.subject, args.tenant, frozenset(args.group), scopes, expires_at_s, args.note)


def _parse_scopes(texts: list[str] | tuple[str, ...]) -> frozenset[str]:
    try:
        return frozenset(parse_scope(text) for text in texts)
    except ValueError as error:
        raise RequestError(f"Unknown scope: {error}.", param="scope") from error


def parse_duration_s(text: str) -> float:
    """Return the seconds in 90s, 15m, 24h, 30d or 4w.

    Raises:
        RequestError: It is none of these.
    """
    matched = _DURATION.fullmatch(text)
    if matched is None:
        raise RequestError("A duration is a number and one of s, m, h, d, w, such as 24h.")
    return float(int(matched.group(1)) * _UNIT_S[matched.group(2)])


def parse_expiry_s(text: str, now_s: float) -> float:
    """Return the moment that a duration or a date (its first second, UTC) means, in seconds since the epoch.

    Raises:
        RequestError: It is neither.
    """
    if _DURATION.fullmatch(text):
        return now_s + parse_duration_s(text)
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).timestamp()
    except ValueError as error:
        raise RequestError("An expiry is a duration such as 90d, or a date such as 2027-01-31.") from error


def _revoke(args: argparse.Namespace, admin: KeyAdmin) -> list[KeyRow]:
    if [args.id, args.digest, args.leaked].count(None) != 2:
        raise RequestError("Name the key in one way: its id, --digest or --leaked.")
    if args.leaked is not None:
        text = sys.stdin.read() if args.leaked == "-" else Path(args.leaked).read_text(encoding="utf-8")
        return _revoke_leaked(text, admin, args.reason)
    if args.digest is not None:
        return [admin.revoke_digest(args.digest, reason=args.reason)]
    return [admin.revoke(args.id, reason=args.reason)]


def _revoke_leaked(text: str, admin: KeyAdmin, reason: str) -> list[KeyRow]:
    """End every key of our form that stands somewhere in the text; else the text is a key that was imported."""
    ended = []
    for found in dict.fromkeys(find_keys(text)):
        with contextlib.suppress(NotFoundError):  # another server's
            ended.append(admin.revoke_leaked(found, reason=reason))
    return ended or [admin.revoke_leaked(text.strip(), reason=reason)]


def _read_import(name: str) -> Iterator[tuple[str, KeySpec]]:
    text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    reader = csv.DictReader(text.splitlines())
    wanted = {"key", "subject", "tenant", "groups", "scopes"}
    if set(reader.fieldnames or ()) != wanted:
        raise RequestError(f"The file's header must be: {','.join(sorted(wanted))}.")
    for line in reader:
        groups = frozenset(part for part in (line["groups"] or "").split(";") if part)
        scopes = _parse_scopes([part for part in (line["scopes"] or "").split(";") if part] or DEFAULT_SCOPES)
        yield line["key"] or "", KeySpec(line["subject"] or "", line["tenant"] or "", groups, scopes)


def _print_new(args: argparse.Namespace, row: KeyRow, text: str, now_s: float) -> None:
    if args.json:
        print(json.dumps(describe_key(row, now_s) | {"key": text}))
        return
    print(text)
    print("This is the only time the key is shown; only a digest of it is kept.", file=sys.stderr)


def _print_rows(args: argparse.Namespace, rows: list[KeyRow], now_s: float) -> None:
    described = [describe_key(row, now_s) for row in rows]
    if args.json:
        print(json.dumps(described))
        return
    lines = [("ID", "STATE", "TENANT/SUBJECT", "EXPIRES", "LAST USED", "GROUPS", "SCOPES", "NOTE")]
    for key in described:
        whose = f"{key['tenant']}/{key['subject']}"
        times = _day(key["expires_at_s"]), _day(key["last_used_at_s"])
        lists = ",".join(key["groups"]), ",".join(key["scopes"])
        lines.append((key["id"], key["state"], whose, *times, *lists, key["note"]))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _day(at_s: float | None) -> str:
    return "never" if at_s is None else datetime.fromtimestamp(at_s, tz=UTC).strftime("%Y-%m-%d %H:%M")
