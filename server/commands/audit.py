"""`strongroom audit`: look at, verify and prove the audit log."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from server.audit.checkpoint import NoteError, VerifierKey
from server.audit.merkle import ProofError
from server.audit.proof import NotPublishedError, Receipt, new_receipt, verify_receipt
from server.audit.tail import follow, last_entries
from server.audit.tiles import TileError
from server.audit.verify import VerificationError, Verifier, describe
from server.errors import AuditLogError, ConfigError, NotFoundError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

HELP = "verify, search, prove and ship the audit log"
EPILOG = """examples:
  strongroom audit verify ./copy-of-audit --key strongroom.local/audit+1f2e…+AQ…
  strongroom audit tail --follow
  strongroom audit prove 4711 --out 4711.tlog-proof
"""
DEFAULT_DIRECTORY = Path(".strongroom/audit")


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
