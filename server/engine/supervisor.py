"""Start children in order, restart what dies, stop them all and leave no process behind; serves no network itself."""

from __future__ import annotations

import asyncio
import signal
from contextlib import suppress
from typing import TYPE_CHECKING

from server.engine.child import POLL_S, Child
from server.engine.isolation import become_subreaper
from server.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.engine.child import ChildSpec, EventHandler


class Supervisor:
    """All children of this process, started in order and stopped in the opposite one.

    Use it from the main thread: the children are tied to the thread that starts them, and die with it.

    Args:
        specs: In the order of starting; each waits until the one before is ready. Those that are not awaited come last.
        on_event: Told all that happens; must not block.
    """

    def __init__(self, specs: tuple[ChildSpec, ...], on_event: EventHandler | None = None) -> None:
        handler = on_event or (lambda _event, _child, _detail: None)
        self._on_event = handler
        self.children: dict[str, Child] = {}
        self._stop = asyncio.Event()
        self._has_stopped = False
        self.add(specs)

    def add(self, specs: tuple[ChildSpec, ...]) -> None:
        """Take further children, which the next `start` starts after those that run."""
        self.children |= {spec.name: Child(spec, self._on_event) for spec in specs}

    async def start(self, on_progress: Callable[[str, float], None] | None = None) -> None:
        """Start those that do not run yet; return when all of them that are awaited are ready.

        Args:
            on_progress: Called about ten times a second with the child that is waited for and the seconds so far.

        Raises:
            StartError: A child was given up before it was ready. Those that run are stopped.
        """
        become_subreaper()
        loop = asyncio.get_running_loop()
        waiting = {name: child for name, child in self.children.items() if not child.is_started}
        awaited = {name: child for name, child in waiting.items() if child.spec.awaited}
        for name, child in awaited.items():
            child.start()
            start_s = loop.time()
            while not child.is_ready.is_set():
                if child.given_up:
                    await self.stop()
                    detail = f": {child.last_error}" if child.last_error else "; its log says why"
                    raise StartError(f"'{name}' could not be started{detail}.")
                if self._stop.is_set():
                    await self.stop()
                    raise StartError("The start was interrupted.")
                if on_progress is not None:
                    on_progress(name, loop.time() - start_s)
                await asyncio.sleep(POLL_S)
        for name, child in waiting.items():
            if name not in awaited:
                child.start()

    def request_stop(self) -> None:
        """Make `run` return; what a signal handler calls."""
        self._stop.set()

    async def run(self) -> bool:
        """Supervise until `request_stop`, or until a critical child is given up; then stop all.

        Returns:
            Whether it ended because it was asked to.
        """
        while not self._stop.is_set():
            if any(child.spec.critical and child.given_up for child in self.children.values()):
                break
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S * 5):
                    await self._stop.wait()
        asked = self._stop.is_set()
        await self.stop()
        return asked

    def handle_signals(self) -> None:
        """Stop on SIGTERM and SIGINT."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.request_stop)

    async def stop(self) -> None:
        """Stop all: those with `stops_first`, then the last started first. No process is left when this returns."""
        self._stop.set()
        if self._has_stopped:
            return
        self._has_stopped = True
        last_first = reversed(self.children.values())
        for child in sorted(last_first, key=lambda child: not child.spec.stops_first):
            await child.stop()

    async def swap(self, spec: ChildSpec) -> None:
        """Stop the child of this name and start it by another spec; returns before it is ready."""
        child = self.children[spec.name]
        await child.stop()
        self.children[spec.name] = fresh = Child(spec, child.on_event)
        fresh.start()
