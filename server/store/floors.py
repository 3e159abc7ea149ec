"""Version floors: the lowest version of each model that may start, kept in the store and remembered by this host.

The store alone is not enough: one that was restored from a backup, or made anew, knows older floors or none, and an
old copy of a model would start again. So each host remembers, beside its store, the last floor of every model that it
loaded; the higher of both counts, unless the store says that the floor was lowered since, by whoever may do that.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sqlalchemy import insert, select, update

from server.errors import ConfigError, ConflictError, SealError
from server.store.database import next_seq
from server.store.tables import model_floors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sqlalchemy import Connection

    from server.store.database import Store

MEMORY_NAME: Final = "floors.json"
FLOOR_RAISED: Final = "weights:floor:raised"
FLOOR_LOWERED: Final = "weights:floor:lowered"
_MAX_MEMORY_BYTES: Final = 1 << 20
# Of two lowerings the later one has the later time, whatever the hosts' clocks say.
_TICK_S: Final = 0.001


@dataclass(frozen=True, slots=True)
class Floor:
    """The lowest version that may start, 0 for any, and when a floor of the model was last lowered, 0 for never."""

    version: int = 0
    lowered_at_s: float = 0.0


class Floors:
    """Reads and changes floors. Every change is put on the audit log before it is made, and one waits for the other.

    Args:
        store: The control data that all replicas share.
        state: This host's state folder; its memory is a file there.
    """

    def __init__(self, store: Store, state: Path) -> None:
        self._store = store
        self._memory = state / MEMORY_NAME

    def get(self, model: str) -> int:
        """Return the lowest version of `model` that may start; 0 where none was ever loaded.

        Raises:
            UnavailableError: The store does not answer.
            ConfigError: This host's memory is damaged.
        """
        with self._store.read() as connection:
            return _higher(_stored(connection, model), self._remembered().get(model, Floor())).version

    def raise_to(self, model: str, version: int, *, by: str, record: Callable[..., None]) -> None:
        """Make a version that was loaded the floor of its model.

        Raises:
            SealError: The floor is higher by now, of kind `version`: another replica loaded a later one meanwhile.
            UnavailableError: The store does not answer; nothing was changed.
            AuditUnavailableError: From `record`; nothing was changed.
        """
        with self._store.write() as connection:
            next_seq(connection)  # also the lock: between what is read here and the commit nobody changes a floor
            stored, memory = _stored(connection, model), self._remembered()
            floor = _higher(stored, memory.get(model, Floor()))
            if version < floor.version:
                raise SealError(
                    f"{model}: version {version} was loaded, but its floor is {floor.version} by now", kind="version"
                )
            if version > stored.version:
                record(FLOOR_RAISED, model=model, floor_before=stored.version, floor=version)
                self._write(connection, model, Floor(version, floor.lowered_at_s), by)
            self._remember(memory, model, Floor(version, floor.lowered_at_s))

    def lower_to(self, model: str, version: int, *, seen: int, by: str, record: Callable[..., None]) -> None:
        """Let older versions start again: an explicit act.

        Args:
            model: Whose floor.
            version: The oldest version that may start from now on.
            seen: The floor that whoever asks was shown.
            by: Who asks.
            record: Called with the fields of the audit event.

        Raises:
            ConfigError: `version` is not below the floor.
            ConflictError: The floor is another one by now; nothing was changed.
            UnavailableError: The store does not answer; nothing was changed.
            AuditUnavailableError: From `record`; nothing was changed.
        """
        with self._store.write() as connection:
            next_seq(connection)
            memory = self._remembered()
            floor = _higher(_stored(connection, model), memory.get(model, Floor()))
            if floor.version != seen:
                raise ConflictError(f"The floor of {model} was {seen} and is {floor.version} by now. Look again.")
            if not 1 <= version < floor.version:
                raise ConfigError(
                    f"The floor of {model} is {floor.version}; a lower one is a version from 1 to {floor.version - 1}."
                    if floor.version > 1
                    else f"{model} has no floor that could be lowered."
                )
            record(FLOOR_LOWERED, model=model, floor_before=floor.version, floor=version)
            lowered = Floor(version, max(self._store.clock(), floor.lowered_at_s + _TICK_S))
            self._write(connection, model, lowered, by)
            self._remember(memory, model, lowered)

    def _write(self, connection: Connection, model: str, floor: Floor, by: str) -> None:
        values = {
            "version": floor.version,
            "lowered_at_s": floor.lowered_at_s,
            "set_at_s": self._store.clock(),
            "set_by": by,
        }
        changed = connection.execute(update(model_floors).where(model_floors.c.model == model).values(**values))
        if not changed.rowcount:
            connection.execute(insert(model_floors).values(model=model, **values))

    def _remembered(self) -> dict[str, Floor]:
        try:
            with self._memory.open("rb") as file:
                content = file.read(_MAX_MEMORY_BYTES + 1)
            if len(content) > _MAX_MEMORY_BYTES:
                raise ValueError("size")
            return {
                model: Floor(int(entry["version"]), float(entry["lowered_at_s"]))
                for model, entry in json.loads(content).items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as err:
            raise ConfigError(
                f"{self._memory}, where this host remembers the version floors it saw, can't be read "
                f"({type(err).__name__}). Restore it from a backup; without it, floors are what the store says."
            ) from err

    def _remember(self, memory: dict[str, Floor], model: str, floor: Floor) -> None:
        """Durable before the store's commit: a crash between the two leaves the higher floor, not the lower one."""
        if memory.get(model) == floor:
            return
        memory[model] = floor
        entries = {m: {"version": f.version, "lowered_at_s": f.lowered_at_s} for m, f in sorted(memory.items())}
        temporary = self._memory.with_suffix(".tmp")
        try:
            # Writers of one host share its store, whose lock the caller holds.
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as out:
                json.dump(entries, out, indent=1)
                out.flush()
                os.fsync(out.fileno())
            temporary.rename(self._memory)
            folder = os.open(self._memory.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as err:
            raise ConfigError(
                f"The floor of {model} can't be remembered in {self._memory}: {err.strerror}. Make its folder writable."
            ) from err


def _stored(connection: Connection, model: str) -> Floor:
    columns = model_floors.c
    row = connection.execute(select(columns.version, columns.lowered_at_s).where(columns.model == model)).first()
    return Floor(int(row.version), float(row.lowered_at_s)) if row is not None else Floor()


def _higher(stored: Floor, remembered: Floor) -> Floor:
    """Return what counts: the store where a floor was lowered since, else the higher of both."""
    if stored.lowered_at_s > remembered.lowered_at_s:
        return stored
    return Floor(max(stored.version, remembered.version), remembered.lowered_at_s)
