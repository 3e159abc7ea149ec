"""Copies of protected code: winnowing fingerprints of a block against a local index.

Source: Schleimer, Wilkerson, Aiken 2003, "Winnowing: local algorithms for document fingerprinting". A copy of at least
`K + WINDOW - 1` tokens shares a fingerprint, whatever its layout and comments.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from server.errors import ConfigError
from server.guard.rules import rules_folder
from server.types import Finding

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

K = 20
WINDOW = 8
MIN_SHARED = 4
_TOKEN = re.compile(r"[A-Za-z_]\w*|\d[\w.]*|[^\s\w]")
_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*|(?m:^\s*#(?!\s*(?:include|define|if|endif|else|pragma))[^\n]*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Index:
    """Fingerprint to the number of its file; `files` holds (path, licence)."""

    files: tuple[tuple[str, str], ...]
    fingerprints: dict[int, int]


def fingerprints(source: str) -> list[tuple[int, int, int]]:
    """Return (hash, start, end) of the chosen runs of K tokens, offsets in `source`."""
    blanked = _COMMENT.sub(lambda m: " " * len(m[0]), source)
    tokens = [(match[0], match.start(), match.end()) for match in _TOKEN.finditer(blanked)]
    hashes = []
    for i in range(len(tokens) - K + 1):
        run = "\0".join(token for token, _, _ in tokens[i : i + K])
        digest = int.from_bytes(hashlib.blake2b(run.encode(), digest_size=7).digest(), "big")
        hashes.append((digest, tokens[i][1], tokens[i + K - 1][2]))
    chosen: list[tuple[int, int, int]] = []
    for i in range(max(1, len(hashes) - WINDOW + 1) if hashes else 0):
        least = min(hashes[i : i + WINDOW], key=lambda item: (item[0], -item[1]))
        if not chosen or chosen[-1] != least:
            chosen.append(least)
    return chosen


def build(files: Iterable[tuple[str, str, str]]) -> Index:
    """Return the index of (path, licence, text)."""
    names: list[tuple[str, str]] = []
    table: dict[int, int] = {}
    for path, licence, text in files:
        names.append((path, licence))
        for digest, _, _ in fingerprints(text):
            table.setdefault(digest, len(names) - 1)
    return Index(tuple(names), table)


def save(index: Index, path: Path) -> None:
    """Write the index; it holds hashes and file names, no code."""
    value = {
        "version": 1,
        "k": K,
        "window": WINDOW,
        "files": index.files,
        "fingerprints": list(index.fingerprints.items()),
    }
    path.write_text(json.dumps(value), encoding="utf-8")


def load(path: Path) -> Index:
    """Return the index at `path`.

    Raises:
        ConfigError: It is no index, or one made with other parameters.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if (value["version"], value["k"], value["window"]) != (1, K, WINDOW):
            raise ConfigError(f"{path} was made by another version: make it again with 'strongroom index'")
        return Index(
            tuple((p, licence) for p, licence in value["files"]), {int(k): int(v) for k, v in value["fingerprints"]}
        )
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ConfigError(f"{path} is not an index of protected code: make it with 'strongroom index'") from err


@lru_cache(maxsize=1)
def shipped() -> Index | None:
    """Return the operator's index (`configs/guard/protected.json`), or None where there is none."""
    path = rules_folder().parent / "protected.json"
    return load(path) if path.is_file() else None


def find_copies(source: str, index: Index | None = None) -> list[Finding]:
    """Return one finding for each indexed file of which `source` holds a copy."""
    known = index or shipped()
    if known is None:
        return []
    shared: dict[int, list[tuple[int, int]]] = {}
    for digest, start, end in fingerprints(source):
        number = known.fingerprints.get(digest)
        if number is not None:
            shared.setdefault(number, []).append((start, end))
    found = []
    for number, spans in sorted(shared.items()):
        if len(spans) >= MIN_SHARED:
            path, licence = known.files[number]
            message = f"This is a copy of {path}, licence {licence}."
            start, end = min(a for a, _ in spans), max(b for _, b in spans)
            found.append(
                Finding(
                    "copied-code",
                    "licence",
                    "medium",
                    message,
                    start,
                    end,
                    fix="Write it anew, or keep to the licence.",
                )
            )
    return found
