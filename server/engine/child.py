"""One child under supervision: started, asked for readiness and health, started again when it dies, stopped whole."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from server.engine.config import EXIT_REFUSED
from server.engine.log import ChildLog
from server.engine.tree import kill_tree, tree_members
from server.errors import KMSUnreachableError, SealError, StartError

logger = logging.getLogger(__name__)

LAUNCHER = Path(__file__).with_name("launch.py")
POLL_S = 0.1
STARTING_GRACE_S = 3.0  # one that was never ready has nothing to end, and vLLM hears no signal while it loads


class ChildEvent(StrEnum):
    """What `on_event` is told; `detail` holds numbers and reasons, never texts."""

    STARTING = "starting"
    READY = "ready"
    EXITED = "exited"
    UNHEALTHY = "unhealthy"
    RESTARTING = "restarting"
    GAVE_UP = "gave_up"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When and how fast a child that died is started again.

    Attributes:
        initial_s: Wait before the first restart; it doubles with each further one.
        max_s: The longest wait.
        stable_s: A child that lived this long starts from `initial_s` again.
        max_restarts: Give up after this many restarts without a stable stretch; None never gives up.
    """

    initial_s: float = 0.5
    max_s: float = 60.0
    stable_s: float = 300.0
    max_restarts: int | None = None

    def delay_s(self, num_failures: int, *, jitter: float) -> float:
        """Wait before restart number `num_failures`; `jitter` in [0, 1) spreads it over its upper half."""
        full_s = min(self.max_s, self.initial_s * 2.0 ** min(num_failures - 1, 32))
        return full_s * (0.5 + jitter / 2)


@dataclass(frozen=True, slots=True)
class Handover:
    """What one start inherits beside the spec; the supervisor closes its own copies of `fds` after the start."""

    env: Mapping[str, str]
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One child and how to treat it.

    Attributes:
        name: Stands in events and logs.
        argv: The command.
        env: Its whole environment.
        pass_fds: Descriptors it inherits, by the same numbers.
        ready: Asked until true; a child that exits or is late before is restarted. A `StartError` from it means that
            the child can never be used.
        healthy: Asked every `health_interval_s` once ready; None where the exit says enough.
        max_health_failures: So many in a row and the whole tree is killed and started again.
        ready_limit_s: How long it may take to become ready.
        stop_signal: Sent first when it is to stop.
        grace_s: From then until the whole tree is killed; `STARTING_GRACE_S` at most for one that was not ready yet.
        log_path: Where its output goes; made with mode 0600.
        discreet_log: Whether texts of callers are kept out of it; see `server/engine/log.py`.
        cwd: Its working directory; None for ours.
        before_start: Called before each start, the first too: makes folders, writes records, and returns what only this
            start inherits. What it raises counts as a failed start; a `StartError` is not tried again, unless it is a
            `KMSUnreachableError`.
        after_exit: Called when a process of this child has ended and its tree is gone, before a restart.
        critical: Whether the supervisor stops everything once it gave the child up.
        awaited: Whether the start of all waits for it; one that is not is started after those that are.
        stops_first: Whether it is stopped before all others: a gateway drains while the engine still answers.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    ready: Callable[[], Awaitable[bool]]
    pass_fds: tuple[int, ...] = ()
    restart_policy: RestartPolicy = RestartPolicy()
    stop_signal: signal.Signals = signal.SIGTERM
    grace_s: float = 20.0
    ready_limit_s: float = 600.0
    healthy: Callable[[], Awaitable[bool]] | None = None
    health_interval_s: float = 2.0
    health_limit_s: float = 10.0
    max_health_failures: int = 5
    log_path: Path | None = None
    discreet_log: bool = False
    cwd: Path | None = None
    before_start: Callable[[], Awaitable[Handover | None]] | None = None
    after_exit: Callable[[], Awaitable[None]] | None = None
    critical: bool = True
    awaited: bool = True
    stops_first: bool = False


EventHandler = Callable[[ChildEvent, str, dict[str, Any]], None]


@dataclass(slots=True)
class _Exit:
    """How one process of a child ended."""

    code: int
    was_ready: bool
    lived_s: float


@dataclass(slots=True)
class Child:
    """One child under supervision; `Supervisor` owns it."""

    spec: ChildSpec
    on_event: EventHandler
    process: subprocess.Popen[bytes] | None = None
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)
    num_restarts: int = 0
    last_error: str = ""
    _stopping: bool = False
    _refused: bool = False
    _log: ChildLog | None = None
    _tree: dict[int, int] = field(default_factory=dict)
    _task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to supervise."""
        self._task = asyncio.create_task(self._supervise(), name=f"supervise-{self.spec.name}")

    @property
    def is_started(self) -> bool:
        """Whether `start` was called."""
        return self._task is not None

    @property
    def given_up(self) -> bool:
        """Whether it will not be started again."""
        return self._task is not None and self._task.done() and not self._stopping

    async def stop(self) -> None:
        """Stop the child and every process it started; returns when none is left."""
        self._stopping = True
        if self.process is not None:
            self._emit(ChildEvent.STOPPING)
            self._tree = tree_members(self.process.pid, self._tree)
            with suppress(ProcessLookupError):
                self.process.send_signal(self.spec.stop_signal)
            grace_s = self.spec.grace_s if self.is_ready.is_set() else min(self.spec.grace_s, STARTING_GRACE_S)
            try:
                async with asyncio.timeout(grace_s):
                    await _wait_exit(self.process)
            except TimeoutError:
                logger.warning("child %s did not stop within %s s and is killed", self.spec.name, grace_s)
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        if self.process is not None:
            await kill_tree(self.process, self._tree)
            self.process = None
        self._close_log()
        self.is_ready.clear()
        self._emit(ChildEvent.STOPPED)

    # --- inside ---

    async def _supervise(self) -> None:
        policy = self.spec.restart_policy
        num_failures = 0
        while True:
            ended = await self._run_once()
            if self._stopping:
                return
            if ended.was_ready and ended.lived_s >= policy.stable_s:
                num_failures = 0
            num_failures += 1
            gave_up = policy.max_restarts is not None and num_failures > policy.max_restarts
            if ended.code == EXIT_REFUSED or self._refused or gave_up:
                self._emit(ChildEvent.GAVE_UP, code=ended.code, restarts=self.num_restarts)
                return
            delay_s = policy.delay_s(num_failures, jitter=secrets.randbelow(1000) / 1000)
            self._emit(ChildEvent.RESTARTING, delay_s=round(delay_s, 3), failures=num_failures)
            self.num_restarts += 1
            await asyncio.sleep(delay_s)

    async def _run_once(self) -> _Exit:
        spec = self.spec
        loop = asyncio.get_running_loop()
        start_s = loop.time()
        self._emit(ChildEvent.STARTING)
        try:
            handover = await spec.before_start() if spec.before_start is not None else None
            self.process = process = self._spawn(handover or Handover({}))
        # The worker supervisor's boundary (STYLE.md, section 5): whatever goes wrong before a child runs is a failed
        # start of this child, and must not take the supervisor and the other children with it.
        except Exception as err:  # noqa: BLE001
            self.last_error = _told(err)
            self._close_log()
            logger.error("child %s could not be started: %s", spec.name, err)  # noqa: TRY400 - no stack: it is expected
            refused = isinstance(err, StartError) and not isinstance(err, KMSUnreachableError)
            self._emit(ChildEvent.EXITED, code=EXIT_REFUSED if refused else -1, ready=False, error=_code_of(err))
            return _Exit(EXIT_REFUSED if refused else -1, was_ready=False, lived_s=0.0)
        self._tree = {}
        watch = asyncio.create_task(self._watch(process, start_s))
        try:
            code = await _wait_exit(process)
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch
        was_ready = self.is_ready.is_set()
        self.is_ready.clear()
        await kill_tree(process, self._tree)  # what it started must not outlive it
        self._close_log()
        self.process = None
        lived_s = loop.time() - start_s
        if not self._stopping:
            self._emit(ChildEvent.EXITED, code=code, ready=was_ready, lived_s=round(lived_s, 3))
        if spec.after_exit is not None:
            await spec.after_exit()
        return _Exit(code, was_ready, lived_s)

    def _spawn(self, handover: Handover) -> subprocess.Popen[bytes]:
        spec, log = self.spec, None
        if spec.log_path is not None and spec.discreet_log:
            self._log = ChildLog(spec.log_path)
            log = self._log.open()
        elif spec.log_path is not None:
            log = os.open(spec.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return _spawn(spec, handover, log)
        finally:
            if log is not None:
                os.close(log)

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    async def _watch(self, process: subprocess.Popen[bytes], start_s: float) -> None:
        """Wait until ready, then ask for health; kill the process where either fails."""
        spec = self.spec
        loop = asyncio.get_running_loop()
        while not await self._ask_ready():
            if self._refused:
                self._emit(ChildEvent.UNHEALTHY, reason="refused", error=self.last_error)
                _kill(process)
                return
            if loop.time() - start_s > spec.ready_limit_s:
                self._emit(ChildEvent.UNHEALTHY, reason="not ready in time", after_s=round(loop.time() - start_s, 1))
                _kill(process)
                return
            await asyncio.sleep(POLL_S)
        self._tree = tree_members(process.pid)
        self.is_ready.set()
        self._emit(ChildEvent.READY, after_s=round(loop.time() - start_s, 3))
        num_failures = 0
        while spec.healthy is not None:
            await asyncio.sleep(spec.health_interval_s)
            healthy = await _ask(spec.healthy, spec.health_limit_s)
            num_failures = 0 if healthy else num_failures + 1
            if num_failures >= spec.max_health_failures:
                self._emit(ChildEvent.UNHEALTHY, reason="health check failed", failures=num_failures)
                _kill(process)
                return

    async def _ask_ready(self) -> bool:
        try:
            return await _ask(self.spec.ready, self.spec.ready_limit_s)
        except StartError as err:
            self._refused = True
            self.last_error = _told(err)
            return False

    def _emit(self, event: ChildEvent, **detail: Any) -> None:
        if self.process is not None:
            detail.setdefault("pid", self.process.pid)
        self.on_event(event, self.spec.name, detail)


def _spawn(spec: ChildSpec, handover: Handover, log: int | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", str(LAUNCHER), str(os.getpid()), *spec.argv]
    try:
        return subprocess.Popen(  # noqa: S603 - the command is made by us, without a shell
            command,
            env={**spec.env, **handover.env},
            pass_fds=(*spec.pass_fds, *handover.fds),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=spec.cwd,
        )
    finally:
        for fd in handover.fds:
            os.close(fd)


async def _wait_exit(process: subprocess.Popen[bytes]) -> int:
    """Return the exit code; a descriptor of the process wakes the loop, so that no thread and no polling is needed."""
    if (code := process.poll()) is not None:
        return code
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    pidfd = os.pidfd_open(process.pid)
    loop.add_reader(pidfd, _resolve, ended)
    try:
        await ended
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    return process.wait()


def _told(err: Exception) -> str:
    """What the operator is told: a refused model's own detail too, which callers never see."""
    return f"{err} {err.detail}" if isinstance(err, SealError) else str(err)


def _resolve(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


async def _ask(question: Callable[[], Awaitable[bool]], limit_s: float) -> bool:
    """Return the answer, False where there is none in time; a `StartError` passes."""
    try:
        async with asyncio.timeout(limit_s):
            return await question()
    except StartError:
        raise
    # A check that can't be made has failed, whatever the reason; the supervisor must live on (STYLE.md, section 5).
    except Exception:  # noqa: BLE001
        return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _code_of(err: Exception) -> str:
    return str(getattr(err, "code", type(err).__name__))
