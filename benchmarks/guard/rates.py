"""Rates of the guard on the repository's labelled cases; `--write` puts the table into docs/guard.md."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from server.guard import languages, scan

ROOT = Path(__file__).parent.parent.parent
CASES = ROOT / "tests" / "vectors" / "guard"
PAGE = ROOT / "docs" / "guard.md"
BEGIN, END = "<!-- rates: begin -->", "<!-- rates: end -->"
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Pair:
    """One weakness, written wrongly and rightly."""

    language: str
    name: str
    label: str
    insecure: str
    safe: str


def load_pairs(folder: Path = CASES) -> list[Pair]:
    """Return all twins of `folder`, in order: its Markdown, or files `LANGUAGE/NAME.bad.EXT` and `NAME.good.EXT`."""
    pairs = []
    for path in sorted(folder.glob("*/*.bad.*")):
        twin = path.with_name(path.name.replace(".bad.", ".good."))
        language = path.parent.name
        pairs.append(Pair(language, path.name.split(".")[0], language, path.read_text(), twin.read_text()))
    for path in sorted(folder.glob("*.md")):
        if path.stem in ("README", "secrets"):
            continue
        for section in path.read_text().split("\n## ")[1:]:
            name = section.split("\n", 1)[0]
            (label, insecure), (_, safe) = _FENCE.findall(section)
            pairs.append(Pair(path.stem, name, label, insecure, safe))
    return pairs


def load_benign(folder: Path) -> list[Path]:
    """Return the correct files of `folder/benign`, which have no insecure twin."""
    return sorted(path for path in (folder / "benign").rglob("*") if path.is_file() and languages.by_path(str(path)))


def load_secrets(folder: Path = CASES) -> list[tuple[str, bool]]:
    """Return (line, whether it holds a credential); `§` is taken out, so that no line here is one to other scanners."""
    if not (folder / "secrets.md").exists():
        return []
    lines = (folder / "secrets.md").read_text().splitlines()
    return [(line[2:].replace("§", ""), line[0] == "+") for line in lines if line.startswith(("+ ", "- "))]


def flagged(pair: Pair, text: str) -> bool:
    """Whether the scan of `text` finds anything."""
    return bool(scan.scan_text(text, language=pair.label).findings)


def rates(folder: Path = CASES) -> list[tuple[str, int, int, int, int]]:
    """Return (language, pairs, insecure flagged, safe flagged, told apart) a language."""
    rows = []
    pairs = load_pairs(folder)
    for language in sorted({pair.language for pair in pairs}):
        mine = [(flagged(p, p.insecure), flagged(p, p.safe)) for p in pairs if p.language == language]
        rows.append(
            (language, len(mine), sum(a for a, _ in mine), sum(b for _, b in mine), sum(a and not b for a, b in mine))
        )
    return rows


def table(folder: Path = CASES) -> str:
    """Return the table as Markdown."""
    lines = ["| language | pairs | recall | false positives | told apart |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {n} | {a / n:.0%} | {b / n:.0%} | {c / n:.0%} |" for name, n, a, b, c in rates(folder)]
    secrets = [(bool(scan.find_anywhere(text)), is_secret) for text, is_secret in load_secrets(folder)]
    positives = [hit for hit, is_secret in secrets if is_secret]
    negatives = [hit for hit, is_secret in secrets if not is_secret]
    if secrets:
        lines.append(
            f"| secrets | {len(positives)} + {len(negatives)} benign | {sum(positives) / len(positives):.0%} | "
            f"{sum(negatives) / len(negatives):.0%} | |"
        )
    benign = load_benign(folder)
    if benign:
        wrong = sum(bool(scan.scan_text(path.read_text(), path=str(path)).findings) for path in benign)
        lines.append(f"| correct files | {len(benign)} | | {wrong / len(benign):.0%} | |")
    return "\n".join(lines)


def main() -> int:
    """Print the table, the pairs that are not told apart, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/guard.md")
    parser.add_argument("--misses", action="store_true", help="list what is missed and what is flagged wrongly")
    parser.add_argument("--set", default="", help="another folder of tests/vectors/guard, or any other path")
    args = parser.parse_args()
    folder = CASES / args.set
    if args.misses:
        for path in load_benign(folder):
            for finding in scan.scan_text(path.read_text(), path=str(path)).findings:
                print("wrong:", path.relative_to(folder), finding.rule, finding.line)
        for pair in load_pairs(folder):
            if not flagged(pair, pair.insecure):
                print("missed:", pair.language, pair.name)
            for finding in scan.scan_text(pair.safe, language=pair.label).findings:
                print("wrong:", pair.language, pair.name, finding.rule, finding.line)
        for text, is_secret in load_secrets(folder):
            if bool(scan.find_anywhere(text)) != is_secret:
                print("secret:", "missed" if is_secret else "wrong", text)
    print(table(folder))
    if args.write:
        page = PAGE.read_text()
        head, rest = page.split(BEGIN)
        PAGE.write_text(head + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
