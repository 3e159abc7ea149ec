"""Finds entries by who, what and when, in an index that can be thrown away and built again from the log."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.audit import journal
from server.audit.entry import parse_entry
from server.audit.tail import Cursor
from server.audit.tiles import split_entries
from server.errors import AuditLogError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_VERSION = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    idx INTEGER PRIMARY KEY, time TEXT NOT NULL, event TEXT NOT NULL, request_id TEXT, subject TEXT, tenant TEXT,
    model TEXT, outcome TEXT, segment INTEGER NOT NULL, commit_offset INTEGER NOT NULL, commit_first INTEGER NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS entry_request ON entry (request_id);
CREATE INDEX IF NOT EXISTS entry_subject ON entry (subject, idx);
CREATE INDEX IF NOT EXISTS entry_model ON entry (model, idx);
CREATE INDEX IF NOT EXISTS entry_event ON entry (event, idx);
CREATE INDEX IF NOT EXISTS entry_time ON entry (time);
CREATE TABLE IF NOT EXISTS finding (
    idx INTEGER NOT NULL, name TEXT NOT NULL, PRIMARY KEY (name, idx)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for; None matches everything. `since` and `until` compare as RFC 3339 texts in UTC."""

    subject: str | None = None
    tenant: str | None = None
    model: str | None = None
    event: str | None = None
    outcome: str | None = None
    request_id: str | None = None
    finding: str | None = None
    since: str | None = None
    until: str | None = None


class SearchIndex:
    """One log's index, a SQLite file beside it. It proves nothing: `verify` does.

    Args:
        directory: The log.
        path: The index; None for `audit-index.db` beside the log's folder.

    Raises:
        AuditLogError: The file is no index, or can't be made.
    """

    def __init__(self, directory: Path, path: Path | None = None) -> None:
        self._directory = directory
        self._path = path or directory.resolve().parent / "audit-index.db"
        try:
            self._path.touch(mode=0o600)
            self._database = sqlite3.connect(self._path, isolation_level=None)
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise AuditLogError(f"{self._path} is an index of another version; run with --rebuild.")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.executescript(f"{_SCHEMA} PRAGMA user_version = {_VERSION};")
        except (OSError, sqlite3.Error) as err:
            raise AuditLogError(f"The audit index {self._path} can't be opened: {err}; run with --rebuild.") from err

    @staticmethod
    def remove(directory: Path, path: Path | None = None) -> None:
        """Throw the index away; the next one is built from the log."""
        path = path or directory.resolve().parent / "audit-index.db"
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def update(self, on_progress: Callable[[int], None] | None = None) -> int:
        """Read on from where the index ends; return how many entries it has seen."""
        (last,) = self._database.execute("SELECT max(idx) FROM entry").fetchone()
        cursor = Cursor(self._directory, 0 if last is None else last + 1)
        with closing(self._database.cursor()) as write:
            write.execute("BEGIN IMMEDIATE")
            try:
                for segment, commit in cursor.read():
                    for index, data in enumerate(split_entries(commit.entries), commit.first):
                        if last is None or index > last:
                            self._add(write, index, parse_entry(data), int(segment.stem), commit)
                    if on_progress is not None:
                        on_progress(cursor.index)
                write.execute("COMMIT")
            except BaseException:
                write.execute("ROLLBACK")
                raise
        return cursor.index

    @staticmethod
    def _add(write: sqlite3.Cursor, index: int, entry: dict[str, Any], segment: int, commit: journal.Commit) -> None:
        principal = entry.get("principal", {})
        write.execute(
            "INSERT OR IGNORE INTO entry VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                index,
                entry["time"],
                entry["event"],
                entry.get("request_id"),
                principal.get("subject") or entry.get("subject"),
                principal.get("tenant") or entry.get("tenant"),
                entry.get("model"),
                entry.get("outcome"),
                segment,
                commit.offset,
                commit.first,
            ),
        )
        for place in ("scan_input", "scan_output"):
            for finding in entry.get(place, {}).get("findings", ()):
                for name in (finding.get("rule"), finding.get("cwe"), finding.get("category")):
                    if name:
                        write.execute("INSERT OR IGNORE INTO finding VALUES (?, ?)", (index, name))

    def find(self, query: Query, *, limit: int = 100) -> Iterator[tuple[int, bytes]]:
        """Yield (index, entry) of what matches, newest first."""
        clauses, values = ["1"], list[Any]()
        for column in ("subject", "tenant", "model", "event", "outcome", "request_id"):
            if (value := getattr(query, column)) is not None:
                clauses.append(f"{column} = ?")
                values.append(value)
        for clause, value in (("time >= ?", query.since), ("time < ?", query.until)):
            if value is not None:
                clauses.append(clause)
                values.append(value)
        if query.finding is not None:
            clauses.append("idx IN (SELECT idx FROM finding WHERE name = ?)")
            values.append(query.finding)
        # The clauses are the constants above; values are bound.
        rows = self._database.execute(
            "SELECT idx, segment, commit_offset, commit_first FROM entry"  # noqa: S608
            f" WHERE {' AND '.join(clauses)} ORDER BY idx DESC LIMIT ?",
            [*values, limit],
        ).fetchall()
        for index, segment, offset, first in rows:
            path = self._directory / journal.FOLDER / journal.segment_name(segment)
            if path.exists():  # pruned entries stay in an old index, their bytes do not
                with path.open("rb") as file:
                    file.seek(offset)
                    commit = next(journal.read_commits(file, first))
                yield index, split_entries(commit.entries)[index - first]
