"""Polls the store for changes and hands them to what lives in memory; one thread a process."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from server.errors import UnavailableError
from server.store.database import read_seq
from server.store.incidents import Quarantine, list_incidents
from server.store.keys import KeyRow, list_keys, touch_keys

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.store.database import Store

# A revocation has to work within 5 s; one second of polling leaves room for a slow database.
POLL_S = 1.0


class StoreWatch:
    """Keeps keys and quarantine in step with the store.

    Args:
        store: What to watch.
        quarantine: Gets the open incidents.
        on_keys: Gets the keys that changed since the last call.
        used: Gives the last uses to write down, and forgets them.
        clock: A monotonic clock, in seconds.
    """

    def __init__(
        self,
        store: Store,
        *,
        quarantine: Quarantine,
        on_keys: Callable[[list[KeyRow]], None],
        used: Callable[[], dict[str, float]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._quarantine = quarantine
        self._on_keys = on_keys
        self._used = used
        self._clock = clock
        self._seq = -1
        self._fresh_at_s = clock()
        self._touched_at_s = clock()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def poll(self) -> bool:
        """Take over what changed; return whether anything did.

        Raises:
            UnavailableError: The store does not answer.
        """
        with self._lock:  # an act of the admin listener polls too, so that this replica follows at once
            asked_at_s = self._clock()
            with self._store.read() as connection:
                seq = read_seq(connection)
                if seq == self._seq:
                    self._fresh_at_s = asked_at_s
                    return False
                changed = list_keys(connection, since_seq=self._seq)
                opened = list_incidents(connection)
            self._on_keys(changed)
            self._quarantine.load(opened)
            self._seq = seq
            self._fresh_at_s = asked_at_s
            return True

    def age_s(self) -> float:
        """Seconds since the store last answered: how old what is in memory may be."""
        return self._clock() - self._fresh_at_s

    def start(self) -> None:
        """Load everything, then poll in a thread.

        Raises:
            UnavailableError: The store does not answer.
        """
        self.poll()
        self._thread = threading.Thread(target=self._run, name="store-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread and write the last uses down."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=10)
        self._flush_used()

    def _run(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self.poll()
                if self._clock() - self._touched_at_s >= 60:
                    self._touched_at_s = self._clock()
                    self._flush_used()
            except UnavailableError:
                continue  # age_s grows; whoever asks decides how old is too old

    def _flush_used(self) -> None:
        used = self._used()
        if used:
            with self._store.write() as connection:
                touch_keys(connection, used)
