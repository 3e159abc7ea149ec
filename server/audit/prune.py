"""Retention: drops the oldest part of a log as a written policy says; every root and old proof still verifies."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from server.audit import journal
from server.audit.entry import format_time, new_entry, parse_entry
from server.audit.log import sync_folder
from server.audit.merkle import TILE_WIDTH
from server.audit.tags import Event
from server.audit.tiles import split_entries, tile_path
from server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MIN_DAYS = 1


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """How long entries must stay, as somebody wrote it down."""

    keep_days: int
    reason: str
    digest: str

    @classmethod
    def load(cls, path: Path) -> RetentionPolicy:
        """Read `{"v": 1, "keep_days": 365, "reason": "…"}`.

        Raises:
            ConfigError: Missing, malformed, unknown fields, or less than a day.
        """
        try:
            data = path.read_bytes()
            fields = json.loads(data)
        except (OSError, ValueError) as err:
            raise ConfigError(f"The retention policy {path} can't be read: {err}.") from err
        if not isinstance(fields, dict) or set(fields) != {"v", "keep_days", "reason"} or fields["v"] != 1:
            raise ConfigError(f'The retention policy {path} must be {{"v": 1, "keep_days": …, "reason": "…"}}.')
        days, reason = fields["keep_days"], fields["reason"]
        if type(days) is not int or days < _MIN_DAYS or not isinstance(reason, str) or not reason:
            raise ConfigError(f"The retention policy {path} needs keep_days of {_MIN_DAYS} or more, and a reason.")
        return cls(days, reason, sha256(data).hexdigest())


@dataclass(frozen=True, slots=True)
class Plan:
    """What a pruning would drop: everything below `minimum_index`."""

    minimum_index: int
    segments: tuple[Path, ...]
    bundles: tuple[Path, ...]


def plan(directory: Path, policy: RetentionPolicy, now: datetime | None = None) -> Plan:
    """Return what the policy permits to drop: whole closed segments whose newest entry is old enough."""
    limit = format_time(int(((now or datetime.now(UTC)) - timedelta(days=policy.keep_days)).timestamp() * 1e9))
    segments = journal.list_segments(directory)
    dropped: list[Path] = []
    minimum = segments[0][0] if segments else 0
    for (first, path), (following, _) in pairwise(segments):
        if _newest_time(path, first) >= limit:
            break
        dropped.append(path)
        minimum = following
    bundles: list[Path] = []
    for index in range(minimum // TILE_WIDTH):
        path = directory / tile_path(None, index)
        if path.exists():
            bundles.append(path)
    return Plan(minimum, tuple(dropped), tuple(bundles))


def _newest_time(path: Path, first: int) -> str:
    newest = ""
    with path.open("rb") as file:
        file.readline()
        for commit in journal.read_commits(file, first):
            for entry in split_entries(commit.entries):
                newest = max(newest, str(parse_entry(entry)["time"]))
    return newest


def prune(directory: Path, policy: RetentionPolicy, planned: Plan, append: Callable[[dict[str, Any]], int]) -> None:
    """Record the pruning, then drop what was planned.

    Args:
        directory: The log.
        policy: What permits it.
        planned: What `plan` returned for it.
        append: Makes an entry durable; nothing is dropped before it has returned.
    """
    append(
        new_entry(
            Event.LOG_PRUNED,
            minimum_index=planned.minimum_index,
            keep_days=policy.keep_days,
            reason=policy.reason,
            policy_digest=policy.digest,
        )
    )
    path = directory / "minimum-index"
    temporary = directory / ".minimum-index"
    with temporary.open("w") as file:
        file.write(f"{planned.minimum_index}\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(directory)
    for old in (*planned.segments, *planned.bundles):
        old.unlink()
