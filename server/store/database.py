"""Opens the store on SQLite or PostgreSQL: connection rules, migrations, transactions."""

from __future__ import annotations

import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from sqlalchemy import Connection, Engine, create_engine, event, select, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from server.errors import ConfigError, UnavailableError
from server.store.tables import counters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MIGRATIONS = Path(__file__).parent / "migrations"
# Any number that no other user of the same PostgreSQL takes for its own advisory lock.
_MIGRATION_LOCK = 0x5374726F6E67
BUSY_TIMEOUT_S = 5


class Store:
    """The control data: keys, incidents, floors, usage. Synchronous; never on the path of a request.

    Make one with `Store.open`. `read` and `write` give a connection inside a transaction; the functions of the sibling
    modules take it.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self.engine = engine
        self.clock = clock

    @classmethod
    def open(cls, url: str, *, clock: Callable[[], float] = time.time) -> Self:
        """Connect and bring the tables up to date.

        Args:
            url: `sqlite:///path/to/store.db` (the file is made with mode 0600) or `postgresql+psycopg://…`.
            clock: Seconds since the epoch.

        Raises:
            ConfigError: The address is wrong, or the store's tables come from a newer version of the program.
            UnavailableError: The database does not answer.
        """
        engine = _connect(url)
        try:
            _migrate(engine)
        except CommandError as error:
            engine.dispose()
            raise ConfigError(
                "The store was written by a newer version of Strongroom; start that version, or restore a backup."
            ) from error
        except SQLAlchemyError as error:
            engine.dispose()
            raise UnavailableError(
                f"The store does not answer ({_kind(error)}); check its address and that it runs."
            ) from error
        return cls(engine, clock)

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads.

        Raises:
            UnavailableError: The database does not answer.
        """
        with _translated(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is committed if the block ends well; on SQLite it takes the write lock at once.

        Raises:
            UnavailableError: The database does not answer, or stays locked.
        """
        with (
            _translated(),
            self.engine.connect().execution_options(strongroom_write=True) as connection,
            connection.begin(),
        ):
            yield connection


# Made once: each statement that is made leaves objects to the cycle collector.
_LAST_CHANGE = select(counters.c.value).where(counters.c.name == "changes")
_COUNT_CHANGE = update(counters).where(counters.c.name == "changes").values(value=counters.c.value + 1)


def next_seq(connection: Connection) -> int:
    """Return the number of this change; its row lock holds other writers until commit, so numbers appear in order."""
    connection.execute(_COUNT_CHANGE)
    return read_seq(connection)


def read_seq(connection: Connection) -> int:
    """Return the number of the last change; equal numbers mean that nothing changed."""
    return int(connection.scalar(_LAST_CHANGE) or 0)


def _connect(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(
            "The store's address is not a database URL; use sqlite:///path or postgresql+psycopg://…"
        ) from error
    if parsed.get_backend_name() == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise ConfigError("The store needs a file: sqlite:///path/to/store.db.")
        return _connect_sqlite(Path(str(parsed.database)), url)
    if parsed.get_backend_name() == "postgresql":
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        return create_engine(
            parsed, pool_pre_ping=True, pool_size=2, max_overflow=4, connect_args={"connect_timeout": 5}
        )
    raise ConfigError(f"The store can't be kept in '{parsed.get_backend_name()}'; use SQLite or PostgreSQL.")


def _connect_sqlite(path: Path, url: str) -> Engine:
    if not path.parent.is_dir():
        raise ConfigError(f"The store's folder {path.parent} does not exist; create it with mode 0700.")
    # Made by us before SQLite can make it with the umask's mode: the file lists who may do what.
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # the driver's own BEGIN comes too late and cannot be IMMEDIATE
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "trusted_schema=OFF"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A transaction that starts by reading and then writes can fail where another wrote between; taking the
        # write lock first makes it wait instead.
        write = connection.get_execution_options().get("strongroom_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _migrate(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.set_main_option("path_separator", "os")
    with engine.connect().execution_options(strongroom_write=True) as connection, connection.begin():
        if connection.dialect.name == "postgresql":  # two replicas that start at once migrate one after the other
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        raise UnavailableError(f"The store does not answer ({_kind(error)}).") from error


def _kind(error: SQLAlchemyError) -> str:
    """Name an error without its text, which may quote values or an address with a password."""
    cause = getattr(error, "orig", None)
    return type(cause if cause is not None else error).__name__
