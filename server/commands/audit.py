"""`strongroom audit`: look at, verify and prove the audit log."""

from __future__ import annotations

import hashlib
import json
import signal
import sqlite3
import sys
import time
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from server.audit.checkpoint import COSIGNATURE_ED25519, NoteError, VerifierKey, load_audit_key, new_audit_key
from server.audit.client import SyncAuditClient
from server.audit.cosigned import Cosigner, WitnessAddress, WitnessError, WitnessState
from server.audit.entry import EntryError, new_entry
from server.audit.export.files import FileSink
from server.audit.export.shapes import SHAPES
from server.audit.export.ship import OVERLAP, Shipper, shipped_up_to
from server.audit.export.syslog import SyslogSink
from server.audit.journal import JournalError
from server.audit.merkle import ProofError
from server.audit.proof import NotPublishedError, Receipt, new_receipt, verify_receipt
from server.audit.prune import RetentionPolicy, plan, prune
from server.audit.search import Query, SearchIndex
from server.audit.tags import Event
from server.audit.tail import follow, last_entries
from server.audit.texts import TenantKeys, TextStore
from server.audit.tiles import TileError
from server.audit.verify import VerificationError, Verifier, describe
from server.audit.witness import Witness, make_server
from server.auth.pepper import load_secret
from server.errors import AuditLogError, AuditUnavailableError, ConfigError, NotFoundError
from server.folders import make_runtime_dir

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from server.audit.export.ship import Sink

HELP = "verify, search, prove and ship the audit log"
EPILOG = """examples:
  strongroom audit verify ./copy-of-audit --key strongroom.local/audit+1f2e…+AQ…
  strongroom audit tail --follow
  strongroom audit prove 4711 --out 4711.tlog-proof
  strongroom audit search --subject alice --since 2026-11-22 --finding CWE-89
  strongroom audit export --to syslog+tls://siem.example:6514 --ca ca.pem --format ocsf
  strongroom audit witness --submit https://witness.example --key witness.vkey --every 60   (a server does it itself)
  strongroom audit prune --policy retention.json --yes
"""
DEFAULT_DIRECTORY = Path(".strongroom/audit")
_SYSLOG_TLS_PORT = 6514  # RFC 5425
_SEARCH_HELP = {
    "subject": "who",
    "tenant": "whose",
    "model": "which model",
    "event": "a tag of docs/specs/audit-log.md, like gateway:request:refused",
    "outcome": "completed, denied, failed, aborted or unknown",
    "finding": "a rule, category or CWE of the guard",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's own verbs and options."""
    verbs = parser.add_subparsers(dest="audit_verb", required=True, metavar="VERB")

    def verb(name: str, run_verb: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text)
        sub.set_defaults(run_verb=run_verb)
        return sub

    sub = verb("verify", _verify, "Check a log, or a copy of it, offline; name the first bad entry.")
    _add_directory(sub)
    sub.add_argument("--key", help="the pinned public key: a vkey, or a file that holds one")
    sub.add_argument(
        "--checkpoint", action="append", default=[], type=Path, help="a checkpoint kept elsewhere; shows a cut tail"
    )
    sub.add_argument("--witness", action="append", default=[], help="a witness's vkey that must have cosigned")
    sub.add_argument("--no-journal", action="store_true", help="the copy has tiles and checkpoint only")
    sub.add_argument("--json", action="store_true", help="print the report as JSON")

    sub = verb("search", _search, "Find entries by who, what and when; the index is brought up to date first.")
    _add_directory(sub)
    for option in ("subject", "tenant", "model", "event", "outcome", "finding"):
        sub.add_argument(f"--{option}", help=_SEARCH_HELP[option])
    sub.add_argument("--request", dest="request_id", help="a request id")
    sub.add_argument("--since", help="RFC 3339 time in UTC, or a prefix of one (2026-11-22)")
    sub.add_argument("--until", help="RFC 3339 time in UTC, or a prefix of one; not included")
    sub.add_argument("-n", "--limit", type=int, default=100, help="at most this many, newest first")
    sub.add_argument("--index", type=Path, help="the index file; default: audit-index.db beside the log")
    sub.add_argument("--rebuild", action="store_true", help="throw the index away first")

    sub = verb("export", _export, "Ship entries and checkpoints to another host or a write-once folder, in order.")
    _add_directory(sub)
    sub.add_argument("--to", required=True, help="syslog+tls://HOST:PORT, or file:///FOLDER")
    sub.add_argument("--format", choices=sorted(SHAPES), default="json", help="how syslog messages look")
    sub.add_argument("--ca", type=Path, help="PEM file of the authority that vouches for the receiver")
    sub.add_argument("--certificate", type=Path, help="PEM file with our certificate and key")
    sub.add_argument("--cursor", type=Path, help="where the next index is kept; default: by receiver, beside the log")
    sub.add_argument("--once", action="store_true", help="stop when everything in the log has been delivered")
    sub.add_argument("--socket", type=Path, help="the writer's socket, to put delays on record")

    sub = verb("witness", _witness, "Be a witness of other hosts' logs, or have a log cosigned by one.")
    _add_directory(sub)
    sub.add_argument("--new-key", metavar="NAME", help="draw the witness's key into --key")
    sub.add_argument(
        "--key",
        action="append",
        default=[],
        help="the witness's private key file; with --submit, the vkey of each",
    )
    sub.add_argument("--log", action="append", default=[], help="vkey of a log to watch; may be repeated")
    sub.add_argument("--state", type=Path, help="the witness's own folder")
    sub.add_argument("--listen", default="127.0.0.1:7380", help="HOST:PORT (default %(default)s)")
    sub.add_argument(
        "--submit", action="append", default=[], metavar="URL", help="have the log cosigned there; may be repeated"
    )
    sub.add_argument("--every", type=float, metavar="SECONDS", help="with --submit: go on, this often")
    sub.add_argument("--ca", type=Path, help="with --submit https://…: PEM file of the authority that vouches for it")
    sub.add_argument("--socket", type=Path, help="with --submit: the writer's socket, to put refusals on record")

    sub = verb("prune", _prune, "Drop the oldest entries as a written retention policy says; old proofs still verify.")
    _add_directory(sub)
    sub.add_argument("--policy", type=Path, required=True, help='{"v": 1, "keep_days": 365, "reason": "…"}')
    sub.add_argument("--socket", type=Path, help="the writer's socket; default: run/audit.sock beside the log")
    sub.add_argument("--yes", action="store_true", help="do it; without it, say what would be done")

    sub = verb("text", _text, "Show texts that policy had kept, or destroy a tenant's key and so all of its texts.")
    _add_directory(sub)
    sub.add_argument("--tenant", help="whose")
    sub.add_argument("--request", dest="request_id", help="of one request only")
    sub.add_argument("--destroy-key", action="store_true", help="erase: destroy the tenant's key")
    sub.add_argument("--prune-days", type=int, help="delete texts that are older, of all tenants")
    sub.add_argument("--keys", type=Path, help="the server's keys folder; default: keys beside the log")
    sub.add_argument("--socket", type=Path, help="the writer's socket; default: run/audit.sock beside the log")

    sub = verb("tail", _tail, "Print the newest entries.")
    _add_directory(sub)
    sub.add_argument("-n", "--lines", type=int, default=10, help="how many")
    sub.add_argument("-f", "--follow", action="store_true", help="go on until interrupted")

    sub = verb("prove", _prove, "Write an entry's receipt (.tlog-proof), or check one.")
    sub.add_argument("index", type=int, help="the entry's index: the x-strongroom-audit-index header")
    _add_directory(sub)
    sub.add_argument("--out", type=Path, help="where the receipt goes; the entry goes beside it as .json")
    sub.add_argument("--check", type=Path, help="check this receipt against --entry and --key instead")
    sub.add_argument("--entry", type=Path, help="the entry's file, for --check")
    sub.add_argument("--key", help="the pinned public key, for --check")
    sub.add_argument("--witness", action="append", default=[], help="a witness's vkey, for --check")


def run(args: argparse.Namespace) -> int:
    """Run one of the verbs."""
    run_verb: Callable[[argparse.Namespace], int] = args.run_verb
    return run_verb(args)


def _add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="?", type=Path, default=DEFAULT_DIRECTORY, help="default: %(default)s")


def _key(text: str) -> VerifierKey:
    path = Path(text)
    try:
        return VerifierKey.parse(path.read_text() if "+" not in text and path.is_file() else text)
    except (NoteError, OSError) as err:
        raise ConfigError(f"The public key {text[:60]!r} can't be read: {err}") from err


def _read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as err:
        raise ConfigError(f"{path} can't be read: {err.strerror}.") from err


def _verify(args: argparse.Namespace) -> int:
    if not args.directory.is_dir():
        raise ConfigError(f"{args.directory} is no folder; give the audit log's folder or a copy of it.")
    shows_progress = sys.stderr.isatty()
    started_s = time.monotonic()
    verifier = Verifier(
        args.directory,
        key=_key(args.key) if args.key else None,
        checkpoints=tuple(_read_text(path) for path in args.checkpoint),
        witnesses=tuple(_key(text) for text in args.witness),
        use_journal=not args.no_journal,
        on_progress=_print_progress if shows_progress else None,
    )
    try:
        report = verifier.verify()
    except VerificationError as err:
        if args.json:
            print(json.dumps({"ok": False, "first_bad_entry": err.index, "error": str(err)}))
        raise AuditLogError(f"The audit log does not verify. First bad entry: {err.index}. {err}") from err
    finally:
        if shows_progress:
            sys.stderr.write("\r\x1b[K")
    if args.json:
        print(json.dumps({"ok": True, **describe(report)}))
        return 0
    print(f"{report.origin}: {report.size} entries verified in {time.monotonic() - started_s:.1f} s")
    print(f"  root       {report.root.hex()}")
    print(f"  time       {report.first_time} to {report.last_time}")
    print(
        f"  requests   {report.num_accepted} accepted, {report.num_finished} finished ({report.num_unknown} unknown),"
        f" {report.num_refused} refused, {report.num_open} open"
    )
    if report.minimum_index:
        print(f"  pruned     entries below {report.minimum_index}")
    if not report.is_pinned:
        print("  note       the key came with the log; pin it with --key to notice a forged log")
    if not args.checkpoint and not args.witness:
        print("  note       a log can't show that its own tail was cut; give --checkpoint or --witness")
    return 0


def _print_progress(index: int) -> None:
    sys.stderr.write(f"\r{index} entries")
    sys.stderr.flush()


def _tail(args: argparse.Namespace) -> int:
    try:
        for index, entry in last_entries(args.directory, args.lines):
            _print_entry(index, entry)
        if args.follow:
            for index, entry in follow(args.directory):
                _print_entry(index, entry)
    except (TileError, OSError) as err:
        raise AuditLogError(f"The audit log in {args.directory} can't be read: {err}") from err
    except KeyboardInterrupt:
        return 0
    return 0


def _print_entry(index: int, entry: bytes) -> None:
    """One object a line: the index, and the entry byte for byte as it was hashed."""
    print(f'{{"index":{index},"entry":{entry.decode()}}}', flush=True)


def _search(args: argparse.Namespace) -> int:
    if args.rebuild:
        SearchIndex.remove(args.directory, args.index)
    query = Query(**{name: getattr(args, name) for name in Query.__slots__})
    shows_progress = sys.stderr.isatty()
    with closing(SearchIndex(args.directory, args.index)) as index:
        try:
            index.update(_print_progress if shows_progress else None)
            if shows_progress:
                sys.stderr.write("\r\x1b[K")
            for at, entry in index.find(query, limit=args.limit):
                _print_entry(at, entry)
        except (TileError, EntryError, JournalError, OSError, sqlite3.Error) as err:
            raise AuditLogError(f"The audit log in {args.directory} can't be searched: {err}") from err
    return 0


def _socket(args: argparse.Namespace) -> Path:
    return Path(args.socket) if args.socket else make_runtime_dir(args.directory.absolute().parent) / "audit.sock"


def _export(args: argparse.Namespace) -> int:
    target = urlsplit(args.to)
    try:
        origin = VerifierKey.parse((args.directory / "vkey").read_text()).name
    except (NoteError, OSError) as err:
        raise AuditLogError(f"The audit log in {args.directory} can't be read: {err}") from err
    sink: Sink
    if target.scheme == "syslog+tls" and target.hostname:
        sink = SyslogSink(
            target.hostname,
            target.port or _SYSLOG_TLS_PORT,
            origin=origin,
            shape=args.format,
            ca=args.ca,
            certificate=args.certificate,
        )
    elif target.scheme == "file" and target.path.startswith("/"):
        sink = FileSink(Path(target.path), origin=origin)
    else:
        raise ConfigError(f"Can't export to {args.to!r}; expected syslog+tls://HOST:PORT or file:///FOLDER.")
    name = hashlib.sha256(args.to.encode()).hexdigest()[:16]
    cursor = args.cursor or args.directory.absolute().parent / "export" / f"{name}.json"

    def on_state(is_delayed: bool, index: int) -> None:
        event = Event.EXPORT_DELAYED if is_delayed else Event.EXPORT_RESUMED
        sys.stderr.write(f"{event}: {target.hostname or target.path} at entry {index}\n")
        if args.socket is not None:
            client = SyncAuditClient(args.socket)
            with suppress(AuditUnavailableError):  # the receiver's outage is on standard error already
                client.append(new_entry(event, receiver=target.hostname or target.path, next_index=index))
            client.close()

    # A file is durable when it stands; what a syslog receiver acknowledged may have died with it.
    overlap = 0 if isinstance(sink, FileSink) else OVERLAP
    shipper = Shipper(args.directory, sink, cursor, overlap=overlap, on_state=on_state)
    signal.signal(signal.SIGTERM, lambda *_: shipper.stop())
    try:
        shipper.run(once=args.once)
    except TileError as err:
        raise AuditLogError(f"The audit log in {args.directory} can't be read: {err}") from err
    except KeyboardInterrupt:
        return 0
    return 0


def _witness(args: argparse.Namespace) -> int:
    if args.submit:
        return _submit(args)
    if len(args.key) != 1:
        raise ConfigError("Give the witness's private key file with one --key (make one with --new-key NAME).")
    key_path = Path(args.key[0])
    if args.new_key:
        print(new_audit_key(key_path, name=args.new_key, key_type=COSIGNATURE_ED25519))
        return 0
    if not args.log or args.state is None:
        raise ConfigError("A witness needs at least one --log VKEY and a --state folder.")
    host, _, port = args.listen.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"--listen must be HOST:PORT, not {args.listen!r}.")
    witness = Witness(load_audit_key(key_path), tuple(_key(text) for text in args.log), args.state)
    try:
        server = make_server(witness, host, int(port))
    except OSError as err:
        raise ConfigError(f"The witness can't listen on {args.listen}: {err.strerror}.") from err
    print(f"witness on http://{host}:{server.server_address[1]}", flush=True)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()
    return 0


_WITNESS_EVENTS = {
    WitnessState.COSIGNS: Event.WITNESS_RESUMED,
    WitnessState.REFUSES: Event.WITNESS_REFUSED,
    WitnessState.LOST: Event.WITNESS_LOST,
}


def _submit(args: argparse.Namespace) -> int:
    if len(args.key) != len(args.submit):
        raise ConfigError("Give each witness's public key: one --key for each --submit, in the same order.")
    witnesses = tuple(WitnessAddress(url, _key(key), args.ca) for url, key in zip(args.submit, args.key, strict=True))

    def on_state(witness: WitnessAddress, state: WitnessState, detail: str) -> None:
        event, name = _WITNESS_EVENTS[state], witness.key.name
        if state is not WitnessState.COSIGNS:
            level = "critical" if state is WitnessState.REFUSES else "error"
            line = {"level": level, "logger": "audit.witness", "message": str(event), "witness": name, "reason": detail}
            sys.stderr.write(json.dumps(line) + "\n")
        if args.socket is not None:
            client = SyncAuditClient(args.socket)
            with suppress(AuditUnavailableError):  # a log that can't be written says so itself
                client.append(new_entry(event, witness=name, url=witness.url, reason=detail))
            client.close()

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cosigner = Cosigner(args.directory, witnesses, on_state=on_state)
    with suppress(KeyboardInterrupt):
        while True:
            _submit_once(cosigner, goes_on=bool(args.every))
            if not args.every:
                break
            time.sleep(args.every)
    return 0


def _submit_once(cosigner: Cosigner, *, goes_on: bool) -> None:
    try:
        size, failures = cosigner.round()
    except (OSError, NoteError) as err:
        if not goes_on:
            raise AuditLogError(f"The log could not be cosigned: {err}") from err
        sys.stderr.write(f"not cosigned: {err}\n")
        return
    if failures and not goes_on:
        name, failure = next(iter(failures.items()))
        what = "" if isinstance(failure, WitnessError) else "The log could not be cosigned: "
        raise AuditLogError(f"{what}{failure} ({name})") from failure
    if not failures:
        print(f"{size} entries cosigned", flush=True)


def _text(args: argparse.Namespace) -> int:
    state = args.directory.absolute().parent
    path = (args.keys or state / "keys") / "audit-text"
    try:
        keys = TenantKeys(state / "texts" / "keys", load_secret(path, "audit text key"))
    except OSError as err:
        raise ConfigError(f"The text store in {state} can't be read: {err.strerror}.") from err
    store = TextStore(state / "texts", keys, redact=_refuse_to_store)
    if args.prune_days is not None:
        print(f"{store.prune(args.prune_days)} files deleted")
        return 0
    if args.tenant is None:
        raise ConfigError("Give --tenant.")
    if not args.destroy_key:
        for stored in store.read(args.tenant, args.request_id):
            print(json.dumps(asdict(stored), ensure_ascii=False))
        return 0
    client = SyncAuditClient(_socket(args))
    try:
        client.append(new_entry(Event.TEXT_KEY_DESTROYED, tenant=args.tenant))  # on record before it is done
    finally:
        client.close()
    print("destroyed" if keys.destroy(args.tenant) else "there was no key")
    return 0


def _refuse_to_store(_text: str) -> str:
    raise AuditLogError("The command line reads texts and never stores any.")


def _prune(args: argparse.Namespace) -> int:
    policy = RetentionPolicy.load(args.policy)
    planned = plan(args.directory, policy)
    shipped = shipped_up_to(args.directory.absolute().parent / "export")
    if shipped is not None and shipped < planned.minimum_index:
        raise ConfigError(
            f"A receiver has the log up to entry {shipped} only, the policy drops those below {planned.minimum_index}. "
            "Let it catch up, or delete its cursor in the folder 'export' beside the log if it is gone for good."
        )
    print(
        f"entries below {planned.minimum_index}: {len(planned.segments)} segments and {len(planned.bundles)} bundles"
        f" are older than {policy.keep_days} days"
    )
    if not args.yes or not planned.segments:
        return 0
    client = SyncAuditClient(_socket(args))
    try:
        prune(args.directory, policy, planned, client.append)
    finally:
        client.close()
    print("dropped; the search index still names them, run: strongroom audit search --rebuild")
    return 0


def _prove(args: argparse.Namespace) -> int:
    if args.check is not None:
        return _check_receipt(args)
    try:
        entry, receipt = new_receipt(args.directory, args.index)
    except NotPublishedError as err:
        raise NotFoundError(str(err)) from err
    except (TileError, NoteError, OSError) as err:
        raise AuditLogError(f"The audit log in {args.directory} can't be read: {err}") from err
    if args.out is None:
        print(receipt.text(), end="")
        return 0
    args.out.write_text(receipt.text())
    args.out.with_suffix(".json").write_bytes(entry)
    print(f"{args.out} and {args.out.with_suffix('.json')}")
    return 0


def _check_receipt(args: argparse.Namespace) -> int:
    if args.entry is None or args.key is None:
        raise ConfigError("--check needs --entry and --key.")
    try:
        receipt = Receipt.parse(_read_text(args.check))
        checkpoint = verify_receipt(
            receipt, args.entry.read_bytes(), _key(args.key), *(_key(text) for text in args.witness)
        )
    except (ProofError, OSError) as err:
        raise AuditLogError(f"The receipt does not verify: {err}") from err
    if receipt.index != args.index:
        raise AuditLogError(f"The receipt is of entry {receipt.index}, not {args.index}.")
    print(f"entry {receipt.index} is in {checkpoint.origin} at {checkpoint.size} entries")
    return 0
