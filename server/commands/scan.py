"""`strongroom scan`: the guard's verdict on files, for CI, hooks and pipelines."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import ConfigError
from server.guard import languages, scan
from server.guard.sarif import to_sarif
from server.types import ScanReport, ScanState

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping

HELP = "scan files for credentials and insecure code"
EPILOG = (
    "example: strongroom scan src/ --format sarif > scan.sarif; exit code 0 clean, 1 findings or unscanned, 2 usage"
)

_SKIPPED = frozenset(
    {".git", ".hg", ".svn", "node_modules", ".venv", "__pycache__", ".strongroom", ".mypy_cache", ".ruff_cache"}
)
_MAX_FILE_BYTES = 4 * 1024 * 1024


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files or directories; - reads standard input")
    parser.add_argument(
        "--format", choices=("text", "json", "sarif"), default="text", help="what to print (default: text)"
    )
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")
    parser.add_argument("--language", help="the language of every text, where its name does not say it")
    parser.add_argument("--stdin-path", metavar="PATH", help="the file name that standard input stands for")
    parser.add_argument("--jsonl", metavar="FIELD", help="each line is JSON; scan the string in this field")
    parser.add_argument(
        "--severity", choices=scan.SEVERITIES, default="low", help="leave out what is below (default: low)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes to scan with (default: 1)")


def run(args: argparse.Namespace) -> int:
    """Scan and print; 0 only when everything was scanned and nothing was found."""
    texts = list(_texts(args))
    reports: dict[str, ScanReport] = {}
    if args.jobs > 1 and len(texts) > 1:
        with ProcessPoolExecutor(args.jobs) as pool:
            for (name, _, _), report in zip(texts, pool.map(_scan_one, texts, chunksize=8), strict=True):
                reports[name] = report
    else:
        for item in _watched(texts):
            reports[item[0]] = _scan_one(item)
    return print_reports(reports, severity=args.severity, form=args.format)


def print_reports(reports: Mapping[str, ScanReport], *, severity: str, form: str) -> int:
    """Print what is `severity` or worse as `text`, `json` or `sarif`; 0 only where all was scanned and nothing left."""
    floor = scan.SEVERITIES.index(severity)
    shown = {name: above(report, floor) for name, report in reports.items()}
    if form == "sarif":
        print(json.dumps(to_sarif(shown.items()), indent=2))
    elif form == "json":
        print(json.dumps(to_json(shown), indent=2))
    else:
        print_text(shown)
    return 0 if all(report.state is ScanState.CLEAN for report in shown.values()) else 1


def to_json(reports: dict[str, ScanReport]) -> dict[str, Any]:
    """Return the reports as JSON-ready values; no text of the files is in them."""
    return {
        "version": 1,
        "files": [
            {
                "path": name,
                "state": report.state.value,
                "reason": report.reason,
                "findings": [{k: v for k, v in asdict(f).items() if v is not None} for f in report.findings],
            }
            for name, report in reports.items()
        ],
        "num_findings": sum(len(report.findings) for report in reports.values()),
    }


def _scan_one(item: tuple[str, str | None, str | None]) -> ScanReport:
    path, text, language = item
    if text is None:
        return ScanReport(ScanState.UNSCANNED, reason=f"not readable as text, or over {_MAX_FILE_BYTES} bytes")
    return scan.scan_text(text, language=language, path=path)


def _texts(args: argparse.Namespace) -> Iterator[tuple[str, str | None, str | None]]:
    if args.language and languages.by_label(args.language) is None:
        raise ConfigError(f"unknown language {args.language!r}: expected one of {', '.join(languages.LANGUAGES)}")
    for given in args.paths:
        if given == "-":
            yield from _split(args, args.stdin_path or "stdin", sys.stdin.read())
            continue
        root = Path(given)
        if not root.exists():
            raise ConfigError(f"{given} does not exist: name a file, a directory or - for standard input")
        for path in sorted(_files(root)):
            yield from _split(args, str(path), _read(path))


def _split(args: argparse.Namespace, name: str, text: str | None) -> Iterator[tuple[str, str | None, str | None]]:
    if args.jsonl is None or text is None:
        yield name, text, args.language
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as err:
                raise ConfigError(f"{name} line {number} is not JSON: expected an object a line") from err
            found = value.get(args.jsonl) if isinstance(value, dict) else None
            yield f"{name}:{number}", found if isinstance(found, str) else None, args.language


def _files(root: Path) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name not in _SKIPPED]
        for name in files:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield path


def _read(path: Path) -> str | None:
    if path.stat().st_size > _MAX_FILE_BYTES:
        return None
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None if b"\0" in raw[:4096] else raw.decode("latin-1")


def _watched(texts: list[tuple[str, str | None, str | None]]) -> Iterator[tuple[str, str | None, str | None]]:
    if len(texts) < 50 or not sys.stderr.isatty():
        yield from texts
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(texts, "scanning", console=Console(stderr=True))


def above(report: ScanReport, floor: int) -> ScanReport:
    """Return the report without what is below a severity's index."""
    kept = tuple(f for f in report.findings if scan.SEVERITIES.index(f.severity) >= floor)
    state = report.state
    if state is ScanState.FINDINGS and not kept:
        state = ScanState.CLEAN
    return ScanReport(state, kept, report.reason)


def print_text(reports: dict[str, ScanReport]) -> None:
    """Print reports (path to report) for people; the counts go to standard error."""
    for name, report in reports.items():
        if report.state is ScanState.UNSCANNED:
            print(f"{name}: unscanned: {report.reason}")
        for f in report.findings:
            print(f"{name}:{f.line}: {f.severity}: {f.rule}{f' ({f.cwe})' if f.cwe else ''}: {f.message}")
            if f.fix:
                print(f"    {f.fix}")
    num_findings = sum(len(report.findings) for report in reports.values())
    num_unscanned = sum(report.state is ScanState.UNSCANNED for report in reports.values())
    print(f"{len(reports)} scanned, {num_findings} findings, {num_unscanned} unscanned", file=sys.stderr)
