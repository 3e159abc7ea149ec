"""`strongroom index`: fingerprints of code that generated code must not copy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from server.errors import ConfigError
from server.guard import languages, licence, rules

if TYPE_CHECKING:
    import argparse

HELP = "index protected code, so that copies of it are found"
EPILOG = "example: strongroom index vendor/gpl-lib --licence GPL-3.0-only --out configs/guard/protected.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("directories", nargs="+", metavar="ADD_DIR", type=Path, help="folders with the code to protect")
    parser.add_argument("--licence", default="unknown", help="the licence's SPDX id, told in a finding")
    parser.add_argument("--out", type=Path, help="where the index goes (default: protected.json beside the rules)")


def run(args: argparse.Namespace) -> int:
    """Build the index and write it; what was in it before is kept."""
    out: Path = args.out or rules.rules_folder().parent / "protected.json"
    files: list[tuple[str, str, str]] = []
    for folder in args.directories:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder: name the folder whose code is to be protected")
        files += [
            (str(path.relative_to(folder)), args.licence, path.read_text(encoding="utf-8", errors="replace"))
            for path in sorted(folder.rglob("*"))
            if path.is_file() and languages.by_path(str(path))
        ]
    made = licence.build(files)
    if out.is_file():
        before = licence.load(out)
        shift = len(before.files)
        table = dict(before.fingerprints)
        for digest, number in made.fingerprints.items():
            table.setdefault(digest, number + shift)
        made = licence.Index(before.files + made.files, table)
    licence.save(made, out)
    print(f"{out}: {len(files)} files added, {len(made.files)} in all, {len(made.fingerprints)} fingerprints")
    return 0
