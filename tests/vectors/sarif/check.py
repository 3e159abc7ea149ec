"""Holds a SARIF log against the standard's schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema

SCHEMA = json.loads((Path(__file__).parent / "sarif-2.1.0-rtm.5.json").read_text(encoding="utf-8"))
_VALIDATOR = jsonschema.Draft4Validator(SCHEMA, format_checker=jsonschema.FormatChecker())


def check_sarif(log: dict[str, Any]) -> None:
    """Check that `log` is SARIF 2.1.0, and that what points into it points at what is there.

    Raises:
        AssertionError: It is not; with every place that is wrong.
    """
    wrong = [f"{list(error.absolute_path)}: {error.message[:200]}" for error in _VALIDATOR.iter_errors(log)]
    assert not wrong, "\n".join(wrong)
    for run in log["runs"]:
        rules = run["tool"]["driver"]["rules"]
        assert all(rules[result["ruleIndex"]]["id"] == result["ruleId"] for result in run["results"])
