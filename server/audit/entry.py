"""One log entry: from a dict to bounded canonical JSON bytes, back again, strictly."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Any

import orjson

ENTRY_VERSION = 1
MAX_ENTRY_BYTES = 65_535  # tlog-tiles: an entry's length is a uint16
MAX_INT = 2**53 - 1  # RFC 8785: beyond it JSON readers disagree
MAX_STRING_CHARS = 1_024
MAX_ITEMS = 256
MAX_DEPTH = 8
_SOFT_ENTRY_BYTES = 16_384
_KEY = re.compile(r"[a-z0-9_]{1,64}")


class EntryError(ValueError):
    """An entry is not canonical, or passes a limit."""


def clean_text(text: str, max_chars: int = MAX_STRING_CHARS) -> str:
    """Return `text` as one printable line of at most `max_chars` characters.

    Line breaks, ANSI escapes, bidirectional overrides and lone surrogates become U+FFFD, so that no reader of the log,
    terminal included, can be told another story by a client.
    """
    if len(text) > max_chars:
        text = text[: max_chars - 1] + "…"
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "�" for char in text)


def _clean(value: Any, max_chars: int, max_items: int, depth: int) -> Any:
    kind = type(value)
    if kind is str:
        return value if len(value) <= max_chars and value.isprintable() else clean_text(value, max_chars)
    if kind is int:
        return value if -MAX_INT <= value <= MAX_INT else str(value)[:max_chars]
    if value is None or kind is bool:
        return value
    if depth >= MAX_DEPTH:
        raise EntryError(f"An audit entry nests deeper than {MAX_DEPTH}; flatten it.")
    if kind is dict:
        if len(value) > max_items:
            value = dict(list(value.items())[:max_items])
        for key in value:
            if key not in _KNOWN_KEYS:
                _check_key(key)
        return {key: _clean(item, max_chars, max_items, depth + 1) for key, item in value.items()}
    if kind in (list, tuple, set, frozenset):
        items = sorted(value) if kind in (set, frozenset) else value
        return [_clean(item, max_chars, max_items, depth + 1) for item in list(items)[:max_items]]
    if isinstance(value, str):  # a StrEnum
        return clean_text(str(value), max_chars)
    if kind is float:
        return repr(value)
    raise EntryError(f"An audit entry holds a {kind.__name__}; only JSON values without fractions are allowed.")


def _is_clean(value: dict[str, Any], depth: int) -> bool:
    """Whether `_clean` would return the same; it builds nothing, and nearly every entry passes."""
    if depth >= MAX_DEPTH or len(value) > MAX_ITEMS or not _KNOWN_KEYS.issuperset(value):
        return False
    for item in value.values():
        kind = type(item)
        if kind is str:
            if len(item) > MAX_STRING_CHARS or not item.isprintable():
                return False
        elif kind is int:
            if not -MAX_INT <= item <= MAX_INT:
                return False
        elif kind is dict:
            if not _is_clean(item, depth + 1):
                return False
        elif kind is list:
            if len(item) > MAX_ITEMS or not all(
                (type(part) is str and len(part) <= MAX_STRING_CHARS and part.isprintable())
                or (type(part) is dict and _is_clean(part, depth + 2))
                for part in item
            ):
                return False
        elif item is not None and kind is not bool:
            return False
    return True


_KNOWN_KEYS: set[str] = set()
_MAX_KNOWN_KEYS = 1_024


def _check_key(key: object) -> None:
    if not isinstance(key, str) or _KEY.fullmatch(key) is None:
        raise EntryError("An audit entry's keys must match [a-z0-9_]{1,64}.")
    if len(_KNOWN_KEYS) < _MAX_KNOWN_KEYS:  # a memo of a pure check: it saves a match for every key of every entry
        _KNOWN_KEYS.add(key)


def encode_entry(entry: dict[str, Any]) -> bytes:
    """Return the canonical bytes of `entry`, with client text cleaned and bounded.

    Raises:
        EntryError: A key or a type that no entry may have, or still over 65,535 bytes after cutting.
    """
    clean = entry if _is_clean(entry, 0) else _clean(entry, MAX_STRING_CHARS, MAX_ITEMS, 0)
    data = orjson.dumps(clean, option=orjson.OPT_SORT_KEYS)
    if len(data) > _SOFT_ENTRY_BYTES:  # many long fields at once: cut each harder rather than lose the entry
        data = orjson.dumps(_clean(entry, 128, 24, 0), option=orjson.OPT_SORT_KEYS)
        if len(data) > MAX_ENTRY_BYTES:
            raise EntryError(f"An audit entry has {len(data)} bytes after cutting; the limit is {MAX_ENTRY_BYTES}.")
    return data


def parse_entry(data: bytes) -> dict[str, Any]:
    """Return the entry that `data` spells, if it is canonical.

    Raises:
        EntryError: Not JSON, not an object, not the one canonical spelling, or required fields are missing.
    """
    try:
        entry = orjson.loads(data)
    except orjson.JSONDecodeError as err:
        raise EntryError("The entry is not JSON.") from err
    if not isinstance(entry, dict):
        raise EntryError("The entry is not a JSON object.")
    # A fraction, a control character or a long string changes in the cleaner, so one comparison catches them all.
    clean = entry if _is_clean(entry, 0) else _clean(entry, MAX_STRING_CHARS, MAX_ITEMS, 0)
    if orjson.dumps(clean, option=orjson.OPT_SORT_KEYS) != data:
        raise EntryError("The entry is not in canonical form.")
    if entry.get("v") != ENTRY_VERSION or not isinstance(entry.get("event"), str) or "time" not in entry:
        raise EntryError("The entry lacks v, event or time, or has an unknown version.")
    return entry


_second = (-1, "")


def format_time(time_ns: int) -> str:
    """Return RFC 3339 UTC with microseconds."""
    global _second  # the text of the current second: worth 1 µs an entry
    seconds, rest_ns = divmod(time_ns, 1_000_000_000)
    cached, text = _second
    if cached != seconds:
        text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.")
        _second = (seconds, text)
    return f"{text}{rest_ns // 1000:06d}Z"


def now() -> str:
    """Return the present time as entries spell it."""
    return format_time(time.time_ns())


def new_entry(event: str, **fields: Any) -> dict[str, Any]:
    """Return an entry of `event` at the present time; for administration, keys, processes and incidents.

    Args:
        event: A value of `server.audit.tags.Event`.
        **fields: What happened; see docs/specs/audit-log.md. Never a secret or a text.
    """
    return {"v": ENTRY_VERSION, "event": str(event), "time": now(), **fields}
