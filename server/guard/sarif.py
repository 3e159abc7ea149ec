"""Reports as SARIF 2.1.0, for code hosts and editors."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from server.types import ScanState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from server.types import Finding, ScanReport

_LEVELS = {"critical": "error", "high": "error", "medium": "warning", "low": "note"}
_SCORES = {"critical": "9.5", "high": "8.0", "medium": "5.5", "low": "3.0"}


def to_sarif(reports: Iterable[tuple[str, ScanReport]]) -> dict[str, Any]:
    """Return one SARIF run over `reports` (path and report); a file without a verdict becomes a tool notification."""
    rules: dict[str, Finding] = {}
    results = []
    notifications = []
    for path, report in reports:
        if report.state is ScanState.UNSCANNED:
            notifications.append(
                {
                    "level": "error",
                    "message": {"text": f"Not scanned: {report.reason}"},
                    "locations": [{"physicalLocation": {"artifactLocation": {"uri": _uri(path)}}}],
                }
            )
        for finding in report.findings:
            rules.setdefault(finding.rule, finding)
            results.append(_result(path, finding, list(rules).index(finding.rule)))
    driver = {
        "name": "strongroom",
        "version": _tool_version(),
        "rules": [_rule(finding) for finding in rules.values()],
    }
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": driver},
                "invocations": [
                    {"executionSuccessful": not notifications, "toolExecutionNotifications": notifications}
                ],
                "columnKind": "unicodeCodePoints",
                "results": results,
            }
        ],
    }


@cache
def _tool_version() -> str:
    try:
        return version("strongroom")
    except PackageNotFoundError:
        return "0"


def _uri(path: str) -> str:
    """Return a path as a URI reference; a name that is not UTF-8 keeps its bytes."""
    return quote(path.encode("utf-8", "surrogateescape"))


def _rule(finding: Finding) -> dict[str, Any]:
    rule: dict[str, Any] = {
        "id": finding.rule,
        "shortDescription": {"text": finding.message},
        "defaultConfiguration": {"level": _LEVELS[finding.severity]},
        "properties": {"security-severity": _SCORES[finding.severity], "tags": ["security", finding.category]},
    }
    if finding.cwe:
        rule["properties"]["tags"].append("external/cwe/" + finding.cwe.lower())
    if finding.fix:
        rule["help"] = {"text": finding.fix}
    return rule


def _result(path: str, finding: Finding, rule_index: int) -> dict[str, Any]:
    return {
        "ruleId": finding.rule,
        "ruleIndex": rule_index,
        "level": _LEVELS[finding.severity],
        "message": {"text": finding.message + (f" {finding.fix}" if finding.fix else "")},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": _uri(path)},
                    "region": {
                        "startLine": finding.line or 1,
                        "charOffset": finding.start,
                        "charLength": max(0, finding.end - finding.start),
                    },
                }
            }
        ],
    }
