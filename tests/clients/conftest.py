"""What a run of the client tests saw, as the table of `docs/clients.md`."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.gateway.kit import free_port
from tests.clients.catalogue import locked_versions
from tests.clients.gateways import Gateway, Real, Scripted, real_gateway, scripted_gateway

if TYPE_CHECKING:
    from collections.abc import Iterator

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "clients.md"
BEGIN, END = "<!-- clients: begin -->", "<!-- clients: end -->"
COLUMNS = ("exchange", "streams", "bad key", "unknown model", "too long", "rate limit", "tool call")
STATE = DOCUMENT.parents[1] / "build" / "clients" / "state"  # `make clean` takes it away
# What a cell says, the word that wins last: a failure is never hidden by what went well elsewhere.
WORDS = ("skipped", "replayed", "driven", "real", "fails")
seen: dict[str, dict[str, str]] = {}


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    with scripted_gateway(tmp_path_factory.mktemp("clients") / "state") as gateway:
        yield gateway


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    with real_gateway(STATE, tmp_path_factory.mktemp("real"), free_port()) as gateway:
        yield gateway


@pytest.fixture(params=["scripted", "real"])
def gateway(request: pytest.FixtureRequest) -> Gateway:
    """Both gateways, one after the other."""
    found: Gateway = request.getfixturevalue(request.param)
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    marker = item.get_closest_marker("shows")
    row = getattr(item, "callspec", None)
    if marker is not None and row is not None and (report.when == "call" or report.failed):
        cells = seen.setdefault(str(row.params["name"]), {})
        how = marker.kwargs.get("how") or ("real" if row.params.get("gateway") == "real" else "driven")
        word = how if report.passed else "skipped" if report.skipped else "fails"
        for capability in marker.args:
            cells[capability] = max(word, cells.get(capability, word), key=WORDS.index)
    return report


def pytest_sessionfinish() -> None:
    if seen and os.environ.get("CLIENTS_TABLE") == "write":
        text = DOCUMENT.read_text(encoding="utf-8")
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        DOCUMENT.write_text(with_table(text, seen, locked_versions(), today), encoding="utf-8")


def with_table(document: str, cells: dict[str, dict[str, str]], known: dict[str, str], today: str) -> str:
    """Return the document with the rows of `cells` renewed; what this run did not touch stays as it was."""
    before, rest = document.split(BEGIN)
    old, after = rest.split(END)
    rows: dict[str, list[str]] = {}
    for line in old.splitlines():
        parts = [part.strip() for part in line.strip("| ").split("|")]
        if len(parts) == len(COLUMNS) + 3 and parts[0] not in {"client", "---"}:
            rows[parts[0]] = parts[1:]
    for name, found in cells.items():
        row = rows.get(name, ["", "", *["–"] * len(COLUMNS)])
        row[:2] = [known.get(name, row[0] or "–"), today]
        for at, column in enumerate(COLUMNS, 2):
            row[at] = found.get(column, row[at])
        rows[name] = row
    lines = [f"| {' | '.join(('client', 'version', 'date', *COLUMNS))} |", f"|{' --- |' * (len(COLUMNS) + 3)}"]
    lines += [f"| {' | '.join((name, *row))} |" for name, row in rows.items()]
    return "\n".join((before + BEGIN, *lines, END + after))
