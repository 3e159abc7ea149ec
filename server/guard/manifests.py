# ruff: noqa: E501  # a pattern is read whole
"""Which packages a manifest asks for, in which version and where it says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

KINDS = ("requirements", "package-json", "pom", "go-mod")
LABELS = {
    "requirements": "requirements", "requirements.txt": "requirements", "pip-requirements": "requirements", "constraints.txt": "requirements",
    "package.json": "package-json", "package-json": "package-json", "pom.xml": "pom", "pom": "pom", "maven": "pom",
    "go.mod": "go-mod", "gomod": "go-mod", "go-mod": "go-mod",
}  # fmt: skip
MAX_NAME_CHARS = 255  # of a file; a longer one is none
_FILES = re.compile(r"(?:.*[-_.])?(?:requirements|constraints)(?:[-_.].*)?\.(?:txt|in)")

_REQUIREMENT = re.compile(
    r"^[ \t]*(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,100})[ \t]*(?:\[[^\]\n]{0,200}\])?[ \t]*(?:(?P<op>===?|~=|>=|<=|!=|<|>)[ \t]*(?P<version>[\w.!+*-]{1,64}))?"
    r"[ \t]*(?:[,;#\\@][^\n]*)?$",
    re.MULTILINE,
)
_SECTION = re.compile(r'"(?:dev|peer|optional)?[dD]ependencies"\s*:\s*\{([^{}]*)\}')
_ENTRY = re.compile(r'"(?P<name>(?:@[\w.-]{1,100}/)?[\w.-]{1,214})"\s*:\s*"(?P<version>[^"\n]{0,200})"')
_DEPENDENCY = re.compile(r"<dependency>((?:(?!</dependency>)[\s\S]){1,4000})</dependency>")
_TAG = {
    name: re.compile(rf"<{name}>\s*([^<>\s]{{1,200}})\s*</{name}>") for name in ("groupId", "artifactId", "version")
}
_PROPERTY = re.compile(r"<([\w.-]{1,100})>\s*([^<>\s]{1,100})\s*</\1>")
_REQUIRE = re.compile(
    r"^[ \t]*(?:require[ \t]+)?(?P<name>[\w-]+\.[\w.-]+(?:/[\w.~-]+)*)[ \t]+(?P<version>v\d[\w.+-]{0,100})",
    re.MULTILINE,
)
_INSTALLS = (
    ("PyPI", re.compile(r"\b(?:pip3?|uv pip|python3? -m pip|pipx|poetry|uv)\s+(?:install|add)\s+([^\n;|&]+)"), re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*)(?:\[[^\]]*\])?==(?P<version>[\w.!+]+)$")),
    ("npm", re.compile(r"\b(?:npm\s+(?:install|i|add)|yarn\s+add|pnpm\s+(?:add|install)|npx)\s+([^\n;|&]+)"), re.compile(r"^(?P<name>(?:@[\w.-]+/)?[\w.-]+)@(?P<version>[\w.^~-]+)$")),
    ("Go", re.compile(r"\bgo\s+(?:get|install)\s+([^\n;|&]+)"), re.compile(r"^(?P<name>[\w-]+\.[\w.-]+(?:/[\w.~-]+)*)@(?P<version>v[\w.+-]+)$")),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dependency:
    """One package that is asked for; `version` is None where none is named, else the lowest one that will do."""

    ecosystem: str
    name: str
    version: str | None
    start: int
    end: int


def by_path(path: str) -> str | None:
    """Return the kind of manifest that a file's name promises, or None."""
    name = PurePath(path).name.lower()
    if name in ("package.json", "pom.xml", "go.mod"):
        return LABELS[name]
    return "requirements" if len(name) <= MAX_NAME_CHARS and _FILES.fullmatch(name) else None


def guess(source: str) -> str | None:
    """Return the kind of manifest that a text without a label is, or None."""
    head = source.lstrip()[:4000]
    if head.startswith("{"):
        return "package-json" if _SECTION.search(source) else None
    if head.startswith("<"):
        return "pom" if "<project" in head and "<dependency>" in source else None
    if re.match(r"(?://[^\n]*\n\s*)*module\s+\S+\s*$", head, re.MULTILINE) and re.search(
        r"^(?:require|go)\b", source, re.MULTILINE
    ):
        return "go-mod"
    lines = [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith(("#", "-"))]
    if lines and all(_REQUIREMENT.match(line) for line in lines) and any("==" in line for line in lines):
        return "requirements"
    return None


def dependencies(source: str, kind: str) -> list[Dependency]:
    """Return what a manifest of `kind`, or a script of `kind` shell or dockerfile, asks for."""
    if kind == "requirements":
        return [
            _made("PyPI", match, match["version"] if match["op"] in ("==", "===", "~=") else None)
            for match in _REQUIREMENT.finditer(source)
        ]
    if kind == "package-json":
        return [
            _made("npm", match, _lowest(match["version"]), section.start(1))
            for section in _SECTION.finditer(source)
            for match in _ENTRY.finditer(section[1])
        ]
    if kind == "go-mod":
        return [_made("Go", match, match["version"]) for match in _REQUIRE.finditer(source)]
    if kind == "pom":
        return _maven(source)
    return _installed(source)


def _made(ecosystem: str, match: re.Match[str], version: str | None, offset: int = 0) -> Dependency:
    start = match.start("name") - (1 if ecosystem == "npm" else 0)
    return Dependency(ecosystem, match["name"], version, start + offset, match.end() + offset)


def _lowest(wanted: str) -> str | None:
    """Return the version that `^1.2.3`, `~1.2.3` and `1.2.3` begin at; a wider range picks what is newest and says nothing."""
    match = re.fullmatch(r"[\^~=v]?\s*(\d+\.\d+\.\d+[\w.+-]*)", wanted.strip())
    return match[1] if match else None


def _maven(source: str) -> list[Dependency]:
    properties = {name: value for name, value in _PROPERTY.findall(source) if "." in name or "-" in name}
    found = []
    for match in _DEPENDENCY.finditer(source):
        parts = {name: pattern.search(match[1]) for name, pattern in _TAG.items()}
        group, artifact, version = parts["groupId"], parts["artifactId"], parts["version"]
        if group is None or artifact is None:
            continue
        named = version[1] if version else None
        if named and named.startswith("${"):
            named = properties.get(named[2:-1])
        found.append(Dependency("Maven", f"{group[1]}:{artifact[1]}", named, match.start(), match.end()))
    return found


def _installed(source: str) -> list[Dependency]:
    found = []
    for ecosystem, command, pinned in _INSTALLS:
        for match in command.finditer(source):
            for word in re.finditer(r"\S+", match[1]):
                bare = word[0].strip("\"'")
                package = pinned.match(bare)
                if package is not None:
                    start = match.start(1) + word.start()
                    version = package["version"].lstrip("^~")
                    found.append(Dependency(ecosystem, package["name"], version, start, start + len(word[0])))
    return found
