"""The order of version numbers in the package ecosystems that advisories speak of."""

from __future__ import annotations

import re

_PEP440 = re.compile(
    r"v?(?:(?P<epoch>\d{1,9})!)?(?P<release>\d{1,12}(?:\.\d{1,12}){0,12})(?:[-_.]?(?P<pre>a|b|c|rc|alpha|beta|pre|preview)[-_.]?(?P<n>\d{0,9}))?"
    r"(?:[-_.]?(?P<post>post|rev|r)[-_.]?(?P<pn>\d{0,9})|-(?P<implicit>\d{1,9}))?(?:[-_.]?(?P<dev>dev)[-_.]?(?P<dn>\d{0,9}))?(?:\+[\w.]{1,64})?",
    re.IGNORECASE,
)
_SEMVER = re.compile(
    r"[v=]?(\d{1,12})(?:\.(\d{1,12}))?(?:\.(\d{1,12}))?(?:-([0-9A-Za-z.-]{1,128}))?(?:\+[\w.-]{1,128})?"
)
_PRE = {"a": 0, "alpha": 0, "b": 1, "beta": 1, "c": 2, "rc": 2, "pre": 2, "preview": 2}
_MAVEN = {
    "alpha": 0, "a": 0, "beta": 1, "b": 1, "milestone": 2, "m": 2, "rc": 3, "cr": 3, "snapshot": 4, "": 5, "ga": 5,
    "final": 5, "release": 5, "sp": 6,
}  # fmt: skip
Key = tuple[object, ...]


def key(ecosystem: str, version: str) -> Key | None:
    """Return what sorts as `version` does in `ecosystem` (PyPI, npm, Go, Maven); None where it is no version there."""
    text = version.strip()
    if ecosystem == "PyPI":
        return _python(text)
    if ecosystem == "Maven":
        return _maven(text)
    return _semantic(text)


def _python(text: str) -> Key | None:
    match = _PEP440.fullmatch(text)
    if match is None:
        return None
    release = [int(part) for part in match["release"].split(".")]
    while len(release) > 1 and release[-1] == 0:
        release.pop()
    is_post = match["post"] is not None or match["implicit"] is not None
    if match["pre"]:
        pre = (_PRE[match["pre"].lower()], int(match["n"] or 0))
    else:
        pre = (-1, 0) if match["dev"] and not is_post else (9, 0)  # 1.0.dev1 comes before 1.0a1
    post = int(match["pn"] or match["implicit"] or 0) + 1 if is_post else 0
    dev = int(match["dn"] or 0) if match["dev"] else 1 << 40
    return (int(match["epoch"] or 0), tuple(release), pre, post, dev)


def _semantic(text: str) -> Key | None:
    match = _SEMVER.fullmatch(text)
    if match is None:
        return None
    numbers = tuple(int(part or 0) for part in match.groups()[:3])
    if match[4] is None:
        return (numbers, (1,))
    # a number sorts before a word, and a version with such a part before the one without
    parts = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in match[4].split("."))
    return (numbers, (0, parts))


def _maven(text: str) -> Key | None:
    if not re.fullmatch(r"[0-9A-Za-z._+-]{1,128}", text) or not text[0].isdigit():
        return None
    parts: list[tuple[int, int, str]] = []
    for word in re.findall(r"\d+|[A-Za-z]+", text.lower()):
        if word.isdigit():
            parts.append((7, int(word), ""))
            continue
        while parts and parts[-1] == (7, 0, ""):
            parts.pop()
        if word in _MAVEN:
            parts.append((_MAVEN[word], 0, ""))
        else:
            parts.append((6, 0, word))
    while parts and parts[-1] in ((7, 0, ""), (5, 0, "")):
        parts.pop()
    return (*parts, (5, 0, ""))
