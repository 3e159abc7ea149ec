# ruff: noqa: E501  # a pattern is read whole
"""Packages that generated code imports or installs and that stand on no list: names a model made up, or that are not allowed.

The lists are the operator's: `configs/guard/packages/<python|javascript|go>.txt`, one name a line, `#` for comments, `*` at the
end for a prefix. Without a list for its ecosystem nothing is said. A line `@public` adds the public names that ship in
`configs/guard/public/`; with it, imports are not judged, for a module of the project's own stands on no public list.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import lru_cache

from server.guard import public
from server.guard.rules import rules_folder
from server.types import Finding

_PYTHON = re.compile(
    r"^[ \t]*(?:from[ \t]+([A-Za-z_]\w*)[\w.]*[ \t]+import\b|import[ \t]+([A-Za-z_]\w*))", re.MULTILINE
)
_JAVASCRIPT = re.compile(r"""(?:\bfrom|\bimport|\brequire\(|\bimport\()\s*['"]([^'"./][^'"]*)['"]""")
_GO = re.compile(r'^\s*(?:import\s+)?(?:[\w.]+\s+)?"([\w-]+\.[\w.-]+/[\w./-]+)"', re.MULTILINE)
_INSTALLS = (
    ("python", re.compile(r"\b(?:pip3?|uv pip|python3? -m pip|pipx|poetry|uv)\s+(?:install|add)\s+([^\n;|&]+)")),
    ("javascript", re.compile(r"\b(?:npm\s+(?:install|i|add)|yarn\s+add|pnpm\s+(?:add|install)|npx)\s+([^\n;|&]+)")),
    ("go", re.compile(r"\bgo\s+(?:get|install)\s+([^\n;|&]+)")),
)
_NAME = re.compile(r"^(@[\w.-]+/)?[A-Za-z0-9][\w./-]*")
# Names under which a few popular packages are imported.
_IMPORT_NAMES = {
    "yaml": "pyyaml", "cv2": "opencv-python", "pil": "pillow", "bs4": "beautifulsoup4", "sklearn": "scikit-learn", "dotenv": "python-dotenv",
    "jwt": "pyjwt", "crypto": "pycryptodome", "dateutil": "python-dateutil", "serial": "pyserial", "git": "gitpython", "attr": "attrs",
    "psycopg2": "psycopg2-binary", "mysqldb": "mysqlclient", "skimage": "scikit-image", "openssl": "pyopenssl", "magic": "python-magic",
}  # fmt: skip
_NODE = frozenset(
    [
        "assert",
        "buffer",
        "child_process",
        "cluster",
        "console",
        "crypto",
        "dgram",
        "dns",
        "domain",
        "events",
        "fs",
        "http",
        "http2",
        "https",
        "inspector",
        "module",
        "net",
        "os",
        "path",
        "perf_hooks",
        "process",
        "punycode",
        "querystring",
        "readline",
        "repl",
        "stream",
        "string_decoder",
        "sys",
        "test",
        "timers",
        "tls",
        "tty",
        "url",
        "util",
        "v8",
        "vm",
        "wasi",
        "worker_threads",
        "zlib",
    ]
)
_LANGUAGES = {
    "python": "python",
    "javascript": "javascript",
    "typescript": "javascript",
    "tsx": "javascript",
    "go": "go",
}


ECOSYSTEMS = ("python", "javascript", "go")
_PUBLIC = "@public"
# What follows these is no package; with the second kind, the packages come from somewhere that no public list knows.
_TAKES_VALUE = re.compile(
    r"-(?:[rctbfip]|-(?:requirement|constraint|target|prefix|find-links|python|platform|trusted-host|cache-dir|group|extra))"
)
_OWN_INDEX = re.compile(r"-(?:i|-(?:extra-|default-)?index(?:-url)?|-find-links|-registry)\b|-e\b|--editable")


@dataclass(frozen=True, slots=True)
class Listed:
    """What an operator's list for one ecosystem says."""

    names: frozenset[str]
    prefixes: tuple[str, ...]
    public: public.Names | None


@lru_cache(maxsize=8)
def allowed(ecosystem: str) -> Listed | None:
    """Return the operator's list for `ecosystem`, or None where there is none.

    Raises:
        ConfigError: The list asks for the public names and they are not there.
    """
    path = rules_folder().parent / "packages" / f"{ecosystem}.txt"
    if not path.is_file():
        return None
    lines = [line.split("#")[0].strip().lower() for line in path.read_text(encoding="utf-8").splitlines()]
    names = frozenset(public.plain(line) for line in lines if line and line != _PUBLIC and not line.endswith("*"))
    prefixes = tuple(line[:-1] for line in lines if line.endswith("*"))
    shipped = public.load(rules_folder().parent / "public" / f"{ecosystem}.bloom") if _PUBLIC in lines else None
    return Listed(names, prefixes, shipped)


def find_unknown(source: str, code: str, language: str) -> list[Finding]:
    """Return imports and installs of packages that stand on no list; `code` is `source` without comments."""
    found = []
    ecosystem = _LANGUAGES.get(language)
    listed = allowed(ecosystem) if ecosystem is not None else None
    if ecosystem is not None and listed is not None and listed.public is None:
        pattern = {"python": _PYTHON, "javascript": _JAVASCRIPT, "go": _GO}[ecosystem]
        for match in pattern.finditer(code):
            group = match.lastindex or 1
            if not is_known(ecosystem, _package(ecosystem, match[group])):
                found.append(unknown(match.start(group), match.end(group), language))
    if language in ("shell", "dockerfile"):
        for ecosystem, pattern in _INSTALLS:
            listed = allowed(ecosystem)
            if listed is None:
                continue
            for match in pattern.finditer(code):
                if listed.public is not None and _OWN_INDEX.search(match[1]):
                    continue
                before = ""
                for word in re.finditer(r"\S+", match[1]):
                    is_value, before = _TAKES_VALUE.fullmatch(before) is not None, word[0]
                    name = None if is_value else _NAME.match(word[0].strip("\"'"))
                    if name is not None and not is_known(ecosystem, name[0].lower().split("==")[0]):
                        start = match.start(1) + word.start()
                        found.append(unknown(start, start + len(word[0]), language))
    return found


def _package(ecosystem: str, name: str) -> str:
    if ecosystem == "javascript":
        parts = name.removeprefix("node:").split("/")
        return "/".join(parts[:2]) if name.startswith("@") else parts[0]
    return name


def is_known(ecosystem: str, name: str) -> bool:
    """Whether `name` stands on the operator's list; everything does where there is no list."""
    low = name.lower()
    if ecosystem == "python" and (name in sys.stdlib_module_names or name == "__future__"):
        return True
    if ecosystem == "javascript" and low in _NODE:
        return True
    listed = allowed(ecosystem)
    if listed is None:
        return True
    names = {public.plain(low), public.plain(_IMPORT_NAMES.get(low, low))}
    if not names.isdisjoint(listed.names) or low.startswith(listed.prefixes or ("\0",)):
        return True
    return listed.public is not None and any(name in listed.public for name in names)


def unknown(start: int, end: int, language: str) -> Finding:
    """Return the finding for a package that is on no list."""
    return Finding(
        "unknown-package", "package", "medium", "This package is on no list: it may not exist, or is not allowed.", start, end,
        "CWE-829", language=language, fix="Use a package from the list, or ask for this one to be added.",
    )  # fmt: skip
