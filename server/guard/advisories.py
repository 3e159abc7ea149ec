"""What the operator's offline database says against a package: known vulnerabilities and refused licences.

`configs/guard/advisories/` holds OSV records: `*.json` (a record or a list), `*.jsonl`, or `*.zip` of JSON files as
osv.dev gives them out. `configs/guard/licences.json` holds `refused` (SPDX names, `*` at the end for a prefix) and
`packages` (ecosystem, name, licence). Without them nothing is said.
"""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from server.errors import ConfigError
from server.guard import manifests, packages, versions
from server.guard.rules import rules_folder
from server.types import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ECOSYSTEMS = frozenset({"PyPI", "npm", "Go", "Maven"})
_SEVERITIES = {"LOW": "low", "MODERATE": "medium", "MEDIUM": "medium", "HIGH": "high", "CRITICAL": "critical"}
_LISTS = {"PyPI": "python", "npm": "javascript", "Go": "go"}


@dataclass(frozen=True, slots=True)
class Advisory:
    """One record's word on one package; `spans` are (first affected, first fixed, last affected)."""

    id: str
    summary: str
    severity: str
    versions: frozenset[str]
    spans: tuple[tuple[str, str | None, str | None], ...]

    def affects(self, ecosystem: str, version: str) -> tuple[bool, str | None]:
        """Return whether `version` is affected, and the first version that mends it."""
        bare = version.removeprefix("v")
        listed = version in self.versions or bare in self.versions
        at = versions.key(ecosystem, bare)
        for first, fixed, last in self.spans:
            if at is None:
                break
            low = versions.key(ecosystem, first) if first != "0" else None
            end = versions.key(ecosystem, fixed or last or "")
            if low is not None and at < low:
                continue
            if end is None or (at < end if fixed else at <= end):
                return True, fixed
        return listed, None


@lru_cache(maxsize=1)
def database() -> dict[tuple[str, str], tuple[Advisory, ...]]:
    """Return the operator's advisories by (ecosystem, name).

    Raises:
        ConfigError: A file there is not readable as OSV records.
    """
    folder = rules_folder().parent / "advisories"
    found: dict[tuple[str, str], list[Advisory]] = {}
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        try:
            for record in _records(path):
                _take(found, record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as err:
            raise ConfigError(
                f"{path} does not hold OSV records ({type(err).__name__}): expected JSON as osv.dev writes it"
            ) from err
    return {name: tuple(advisories) for name, advisories in found.items()}


@lru_cache(maxsize=1)
def licences() -> tuple[tuple[str, ...], dict[tuple[str, str], str]]:
    """Return (refused licences, licence by ecosystem and name) of the operator's list.

    Raises:
        ConfigError: It is not of the form that `docs/guard.md` gives.
    """
    path = rules_folder().parent / "licences.json"
    if not path.is_file():
        return (), {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        refused = tuple(str(name) for name in value["refused"])
        known = {
            (ecosystem, _plain(ecosystem, name)): str(licence)
            for ecosystem, names in value["packages"].items()
            for name, licence in names.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise ConfigError(
            f"{path} is no list of licences: expected 'refused' (a list) and 'packages' (ecosystem, name, licence)"
        ) from err
    return refused, known


def find_refused(source: str, kind: str) -> list[Finding]:
    """Return the packages of a manifest that are vulnerable as named, under a refused licence, or unknown."""
    findings = []
    for wanted in manifests.dependencies(source, kind):
        name = _plain(wanted.ecosystem, wanted.name)
        findings += [_vulnerable(wanted, *hit) for hit in _hits(wanted, name)]
        licence = licences()[1].get((wanted.ecosystem, name))
        if licence is not None and _is_refused(licence):
            findings.append(
                Finding(
                    "refused-licence",
                    "licence",
                    "medium",
                    f"{wanted.name} is under {licence}, which is refused here.",
                    wanted.start,
                    wanted.end,
                    language=kind,
                    fix="Use a package under another licence, or ask for this one to be allowed.",
                )
            )
        if (
            kind in manifests.KINDS
            and wanted.ecosystem in _LISTS
            and not packages.is_known(_LISTS[wanted.ecosystem], wanted.name)
        ):
            findings.append(packages.unknown(wanted.start, wanted.end, kind))
    return findings


def _hits(wanted: manifests.Dependency, name: str) -> Iterator[tuple[Advisory, str | None]]:
    if wanted.version is None:
        return
    for advisory in database().get((wanted.ecosystem, name), ()):
        affected, fixed = advisory.affects(wanted.ecosystem, wanted.version)
        if affected:
            yield advisory, fixed


def _vulnerable(wanted: manifests.Dependency, advisory: Advisory, fixed: str | None) -> Finding:
    return Finding(
        "vulnerable-package",
        "package",
        advisory.severity,
        f"{wanted.name} {wanted.version}: {advisory.id}: {advisory.summary}".rstrip(": "),
        wanted.start,
        wanted.end,
        "CWE-1395",
        fix=f"Use {fixed} or later." if fixed else "Use a version that is not affected, or another package.",
    )


def _is_refused(licence: str) -> bool:
    """Whether an SPDX expression leaves no way: of `A OR B` one will do, of `A AND B` both must."""
    refused = licences()[0]

    def hit(name: str) -> bool:
        return any(name == r or (r.endswith("*") and name.startswith(r[:-1])) for r in refused)

    ways = re.split(r"\s+OR\s+", licence.replace("(", " ").replace(")", " ").strip())
    return all(any(hit(part.strip()) for part in re.split(r"\s+(?:AND|WITH)\s+", way)) for way in ways)


def _plain(ecosystem: str, name: str) -> str:
    low = name if ecosystem == "Go" else name.lower()
    return re.sub(r"[-_.]+", "-", low) if ecosystem == "PyPI" else low


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".json":
        value = json.loads(path.read_text(encoding="utf-8"))
        yield from value if isinstance(value, list) else [value]
    elif path.suffix == ".jsonl":
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip():
                yield json.loads(line)
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                if entry.endswith(".json"):
                    yield json.loads(archive.read(entry))


def _take(found: dict[tuple[str, str], list[Advisory]], record: dict[str, Any]) -> None:
    identifier = str(record["id"])
    if record.get("withdrawn"):
        return
    severity = _SEVERITIES.get(str((record.get("database_specific") or {}).get("severity", "")).upper(), "high")
    for affected in record.get("affected") or ():
        package = affected.get("package") or {}
        ecosystem = str(package.get("ecosystem", "")).split(":")[0]
        if ecosystem not in ECOSYSTEMS:
            continue
        spans = [
            span
            for ranged in affected.get("ranges") or ()
            if ranged.get("type") in ("SEMVER", "ECOSYSTEM")
            for span in _spans(ranged["events"])
        ]
        advisory = Advisory(
            identifier,
            str(record.get("summary") or "")[:200],
            severity,
            frozenset(map(str, affected.get("versions") or ())),
            tuple(spans),
        )
        found.setdefault((ecosystem, _plain(ecosystem, str(package["name"]))), []).append(advisory)


def _spans(events: list[dict[str, str]]) -> Iterator[tuple[str, str | None, str | None]]:
    first: str | None = None
    for event in events:
        if "introduced" in event:
            first = str(event["introduced"])
        elif first is not None and ("fixed" in event or "last_affected" in event):
            yield first, event.get("fixed"), event.get("last_affected")
            first = None
    if first is not None:
        yield first, None, None
