"""Ends completions that a newer one of the same caller has made stale: each key stroke makes the last answer useless.

A request is stale when a newer one of the same credential, for the same model, stands at the same place of the same
text: what is near the cursor is the same but for what a few key strokes change. The very same request sent twice makes
nothing stale, for editors ask for several alternatives at once.

A newer one ends one that runs only when nothing can refuse it any more: it has what limits and budgets must give, and
takes the other's places over. One that only waits for a place is ended as soon as a newer one has to wait, too.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.errors import SupersededError
from server.types import Completion

if TYPE_CHECKING:
    from server.policy.rate import Grant
    from server.types import ModelRequest, Principal

Key = tuple[str, str, str, str]

NEAR_CHARS = 24
"""What stands so near the cursor may have changed by a few key strokes."""

ANCHOR_CHARS = 64
"""What stands beyond it must be the same …"""

SHIFT_CHARS = 256
"""… shifted by no more than this, for a suggestion that was accepted may be a whole line."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the cursor stands: the text before it, backwards, and the text after it; no more than is compared."""

    whole: tuple[str, str]
    before: str
    after: str

    @classmethod
    def of(cls, completion: Completion) -> Place:
        """Return the place of a request that has a suffix."""
        size = NEAR_CHARS + ANCHOR_CHARS + SHIFT_CHARS
        prompt, suffix = completion.prompt, completion.suffix or ""
        return cls((prompt, suffix), prompt[: -size - 1 : -1], suffix[:size])

    def makes_stale(self, older: Place) -> bool:
        """Whether a request here makes one at `older` useless."""
        return self.whole != older.whole and _is_near(older.before, self.before) and _is_near(older.after, self.after)


def _is_near(old: str, new: str) -> bool:
    """Whether two texts that lead away from a cursor are the same but for a few key strokes at their beginning."""
    anchor, other = old[NEAR_CHARS : NEAR_CHARS + ANCHOR_CHARS], new[NEAR_CHARS : NEAR_CHARS + ANCHOR_CHARS]
    if not anchor or not other:  # near an end of the file: then the other must be near it too
        return len(old) + len(new) <= 2 * NEAR_CHARS + SHIFT_CHARS
    return anchor in new or other in old


class Running:
    """One request while it waits or runs.

    Attributes:
        key: Whose it is, and of which model.
        cursor: Where it stands; None for what has no cursor and is never stale.
        grant: What it holds of its limits, until it is settled.
        has_place: Whether it holds a place in the engine.
    """

    __slots__ = ("_task", "cursor", "grant", "has_place", "is_stale", "key")

    def __init__(self, key: Key, cursor: Place | None) -> None:
        self.key = key
        self.cursor = cursor
        self.grant: Grant | None = None
        self.has_place = False
        self.is_stale = False
        self._task = asyncio.current_task()

    def end(self) -> None:
        """End it: its task is cancelled, which stops the engine at once."""
        if not self.is_stale and self._task is not None:
            self.is_stale = True
            self._task.cancel()

    def settle(self) -> SupersededError:
        """Return what the caller is told, and take the cancellation back: it was meant for this request alone."""
        if self._task is not None:
            self._task.uncancel()
        return SupersededError()


class Completions:
    """The completions with a suffix that wait or run now, by credential and model."""

    def __init__(self) -> None:
        self._known: dict[Key, list[Running]] = {}

    def begin(self, principal: Principal, request: ModelRequest) -> Running:
        """Note a request, if it has a cursor.

        A raw prompt in the family's own markers has none here: only the tokenizer's side knows how to read it.
        """
        completion = request.payload
        key = (principal.tenant, principal.subject, principal.credential_id, request.model)
        if not isinstance(completion, Completion) or completion.suffix is None:
            return Running(key, None)
        running = Running(key, Place.of(completion))
        self._known.setdefault(key, []).append(running)
        return running

    def stale(self, newer: Running) -> list[Running]:
        """Return the older ones that this one makes useless, and that nobody has ended yet."""
        place = newer.cursor
        if place is None:
            return []
        known = self._known[newer.key]
        older = known[: known.index(newer)]
        return [one for one in older if not one.is_stale and one.cursor is not None and place.makes_stale(one.cursor)]

    def forget(self, running: Running) -> None:
        """Forget a request that has ended, or whose answer is whole: it is never stale."""
        known = self._known.get(running.key, [])
        if running in known:
            known.remove(running)
            if not known:
                del self._known[running.key]
