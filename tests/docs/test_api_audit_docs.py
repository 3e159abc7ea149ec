"""docs/api-audit.md names a test for every check, and every test that it names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line.strip("| ").split(" | ") for line in (ROOT / "docs" / "api-audit.md").read_text().splitlines()[7:]]
CHECKS = [f"{area}-{number:02}" for area, most in (("AU", 15), ("AZ", 9), ("RL", 8)) for number in range(1, most + 1)]


def test_every_check_has_its_row():
    assert [row[0] for row in ROWS if re.fullmatch(r"[A-Z]{2}-\d\d", row[0])] == CHECKS


@pytest.mark.parametrize("row", [row for row in ROWS if row[0] in CHECKS], ids=lambda row: row[0])
def test_every_test_is_there(row):
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", row[2])
    assert named
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE), name
