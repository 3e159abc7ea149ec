# ruff: noqa: E501  # a pattern is read whole
"""Packages that generated code imports or installs and that stand on no list: names a model made up, or that are not allowed.

The lists are the operator's: `configs/guard/packages/<python|javascript|go>.txt`, one name a line, `#` for comments, `*` at the
end for a prefix. Without a list for its ecosystem nothing is said.
"""

from __future__ import annotations

import re
import sys
from functools import lru_cache

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


@lru_cache(maxsize=8)
def allowed(ecosystem: str) -> tuple[frozenset[str], tuple[str, ...]] | None:
    """Return (names, prefixes) that are on the operator's list for `ecosystem`, or None where there is no list."""
    path = rules_folder().parent / "packages" / f"{ecosystem}.txt"
    if not path.is_file():
        return None
    lines = [line.split("#")[0].strip().lower() for line in path.read_text(encoding="utf-8").splitlines()]
    names = frozenset(_plain(line) for line in lines if line and not line.endswith("*"))
    return names, tuple(line[:-1] for line in lines if line.endswith("*"))


def find_unknown(source: str, code: str, language: str) -> list[Finding]:
    """Return imports and installs of packages that stand on no list; `code` is `source` without comments."""
    found = []
    ecosystem = _LANGUAGES.get(language)
    if ecosystem is not None and allowed(ecosystem) is not None:
        pattern = {"python": _PYTHON, "javascript": _JAVASCRIPT, "go": _GO}[ecosystem]
        for match in pattern.finditer(code):
            group = match.lastindex or 1
            if not _is_known(ecosystem, _package(ecosystem, match[group])):
                found.append(_finding(match.start(group), match.end(group), language))
    if language in ("shell", "dockerfile"):
        for ecosystem, pattern in _INSTALLS:
            if allowed(ecosystem) is None:
                continue
            for match in pattern.finditer(code):
                for word in re.finditer(r"\S+", match[1]):
                    name = _NAME.match(word[0].strip("\"'"))
                    if name is not None and not _is_known(ecosystem, name[0].lower().split("==")[0]):
                        start = match.start(1) + word.start()
                        found.append(_finding(start, start + len(word[0]), language))
    return found


def _package(ecosystem: str, name: str) -> str:
    if ecosystem == "javascript":
        parts = name.removeprefix("node:").split("/")
        return "/".join(parts[:2]) if name.startswith("@") else parts[0]
    return name


def _is_known(ecosystem: str, name: str) -> bool:
    low = name.lower()
    if ecosystem == "python" and (name in sys.stdlib_module_names or name == "__future__"):
        return True
    if ecosystem == "javascript" and low in _NODE:
        return True
    listed = allowed(ecosystem)
    if listed is None:
        return True
    names, prefixes = listed
    plain = _plain(low)
    return plain in names or _plain(_IMPORT_NAMES.get(low, low)) in names or low.startswith(prefixes or ("\0",))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name) if not name.startswith("@") and "/" not in name else name


def _finding(start: int, end: int, language: str) -> Finding:
    return Finding(
        "unknown-package", "package", "medium", "This package is on no list: it may not exist, or is not allowed.", start, end,
        "CWE-829", language=language, fix="Use a package from the list, or ask for this one to be added.",
    )  # fmt: skip
