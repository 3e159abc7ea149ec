"""A few processes that judge blocks of code off the event loop; one that throws, hangs or dies gives no verdict.

Each worker speaks one JSON line a block over its pipes. It is started at the first block, killed when its time is up,
and replaced. There is no shared state: a worker that crashes takes only its own block with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING

from server.types import Finding

if TYPE_CHECKING:
    from pathlib import Path

    from server.guard.scan import CodeScan

_LIMIT_BYTES = 64 * 1024 * 1024
_START_TIMEOUT_S = 30.0


class _Worker:
    """One process and its pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    @classmethod
    async def start(cls, memory_bytes: int, rules: Path | None) -> _Worker:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        if rules is not None:
            environment["STRONGROOM_GUARD_RULES"] = str(rules / "rules")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "server.guard.worker", str(memory_bytes),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            limit=_LIMIT_BYTES, env=environment,
        )  # fmt: skip
        worker = cls(process)
        try:
            await asyncio.wait_for(worker._line(), _START_TIMEOUT_S)  # it says so when its rules are loaded
        except BaseException:
            await worker.kill()
            raise
        return worker

    async def _line(self) -> bytes:
        line = await self.process.stdout.readline() if self.process.stdout else b""
        if not line:
            raise EOFError
        return line

    async def ask(self, source: str, language: str | None) -> CodeScan:
        if self.process.stdin is None:
            raise EOFError
        self.process.stdin.write(json.dumps([source, language]).encode() + b"\n")
        await self.process.stdin.drain()
        answer = json.loads(await self._line())
        if answer["error"]:
            return (), str(answer["error"])
        return tuple(Finding(**finding) for finding in answer["findings"]), None

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        if self.process.stdin is not None:
            self.process.stdin.close()
        await self.process.wait()
        transport = getattr(self.process, "_transport", None)  # its pipes are closed by no public call
        if transport is not None:
            transport.close()


class WorkerPool:
    """Judges blocks of code in at most `num_workers` processes.

    Args:
        num_workers: Processes at most; they start when there is a block to judge.
        timeout_s: How long one block may take, waiting for a free worker not counted.
        memory_bytes: Address space each worker may have; 0 for no limit.
        rules: The folder that holds `rules/`; None for the one that ships with the source.

    Attributes:
        failures: How many blocks got no verdict, by cause: `timeout`, `died`.
    """

    def __init__(
        self, *, num_workers: int = 2, timeout_s: float = 2.0, memory_bytes: int = 2 << 30, rules: Path | None = None
    ) -> None:
        self._rules = rules
        self._slots = asyncio.Semaphore(num_workers)
        self._idle: list[_Worker] = []
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._closed = False
        self.failures: Counter[str] = Counter()

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that wait for a block."""
        return [worker.process.pid for worker in self._idle]

    async def warm(self) -> None:
        """Start one worker now, so that the first block does not wait for it."""
        async with self._slots:
            if not self._idle:
                self._idle.append(await _Worker.start(self._memory_bytes, self._rules))

    async def scan_code(self, source: str, language: str | None) -> CodeScan:
        """Return the findings in one block, or the reason why there is no verdict."""
        if self._closed:
            return (), "the scanner is shut down"
        async with self._slots:
            worker = self._idle.pop() if self._idle else None
            keep = False
            try:
                if worker is None or worker.process.returncode is not None:
                    worker = await _Worker.start(self._memory_bytes, self._rules)
                verdict = await asyncio.wait_for(worker.ask(source, language), self._timeout_s)
                keep = True
            except TimeoutError:
                self.failures["timeout"] += 1
                return (), f"the scanner took longer than {self._timeout_s} s"
            except (OSError, EOFError, ValueError, KeyError, TypeError) as err:
                self.failures["died"] += 1
                return (), f"the scanner died ({type(err).__name__})"
            else:
                return verdict
            finally:  # also on cancellation: a worker with an answer under way must not get another block
                if worker is not None and not keep:
                    await worker.kill()
                elif worker is not None:
                    self._idle.append(worker)

    async def close(self) -> None:
        """Stop every worker."""
        self._closed = True
        while self._idle:
            await self._idle.pop().kill()


def encode(findings: tuple[Finding, ...], error: str | None) -> bytes:
    """Return one answer line of a worker."""
    return json.dumps({"error": error, "findings": [asdict(finding) for finding in findings]}).encode() + b"\n"
