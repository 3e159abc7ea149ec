"""A second look at the code of an answer, by a slower engine that the operator supplies, after the answer has ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import AuditUnavailableError
from server.guard import languages
from server.guard.rules import rules_folder

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Block = tuple[str, str | None]  # source, language

EVENT = "guard:answer:scanned"
MAX_QUEUED = 64
MAX_BLOCKS = 64
MAX_FINDINGS = 32
_MAX_OUTPUT_BYTES = 8 * 1024 * 1024
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a private folder is made in it: code must not reach a disk
_SUFFIXES = {"python": ".py", "javascript": ".js", "typescript": ".ts", "java": ".java"}
_SEVERITIES = {"ERROR": "high", "WARNING": "medium", "INFO": "low"}


class NoVerdictError(Exception):
    """The engine said nothing that counts; the message says why, without a text."""


class DeeperScanner:
    """Scans the code of answers one after the other, and puts what was found on record.

    Args:
        executable: A `semgrep`, in an environment of its own.
        timeout_s: How long one answer may take.
        memory_bytes: Data that one process of the engine may have.
        rules: A folder of rules, the only place they come from; None for the one beside the guard's own.
    """

    def __init__(
        self, executable: Path, *, timeout_s: float = 60.0, memory_bytes: int = 3 << 30, rules: Path | None = None
    ) -> None:
        self._executable = executable
        self._timeout_s = timeout_s
        self._memory_bytes = memory_bytes
        self._rules = rules or rules_folder().parent / "semgrep"
        self._queue: asyncio.Queue[tuple[str, tuple[Block, ...]]] = asyncio.Queue(MAX_QUEUED)
        self._missed: dict[str, int] = {}

    def submit(self, request_id: str, blocks: tuple[Block, ...]) -> None:
        """Have the blocks of an answer scanned later; where too many wait, the record will say that they were not."""
        try:
            self._queue.put_nowait((request_id, blocks))
        except asyncio.QueueFull:
            self._missed[request_id] = len(blocks)

    async def run(self, record: Callable[..., Awaitable[Any]]) -> None:
        """Scan and record until cancelled; what waits then, or is under way, is recorded as unscanned."""
        try:
            while True:
                request_id, blocks = await self._queue.get()
                self._missed[request_id] = len(blocks)  # until there is a record that says otherwise
                told = await self.scan(blocks)
                del self._missed[request_id]
                await _tell(record, request_id, told)
                await self._tell_missed(record, "too many answers were waiting")
        finally:
            while not self._queue.empty():
                request_id, blocks = self._queue.get_nowait()
                self._missed[request_id] = len(blocks)
            await self._tell_missed(record, "the server stopped")

    async def _tell_missed(self, record: Callable[..., Awaitable[Any]], reason: str) -> None:
        missed, self._missed = self._missed, {}
        for request_id, num_blocks in missed.items():
            told = {"state": "unscanned", "reason": reason, "num_blocks": num_blocks, "num_findings": 0, "findings": []}
            await _tell(record, request_id, told)

    async def scan(self, blocks: tuple[Block, ...]) -> dict[str, Any]:
        """Return what the record says of the blocks."""
        reasons: list[str] = []
        findings: list[dict[str, Any]] = []
        named: dict[str, tuple[int, str]] = {}
        for number, (source, label) in enumerate(blocks[:MAX_BLOCKS]):
            language = label or languages.guess(source)
            if language in _SUFFIXES:
                named[f"{number}{_SUFFIXES[language]}"] = (number, source)
            else:
                reasons.append(f"there are no deeper rules for {language or 'a block of no known language'}")
        if len(blocks) > MAX_BLOCKS:
            reasons.append(f"there are more than {MAX_BLOCKS} blocks")
        if named:
            try:
                findings = await self._ask(named)
            except NoVerdictError as err:
                reasons.append(str(err))
            except Exception as err:  # noqa: BLE001 - the engine's boundary: whatever fails is told as unscanned, by name only
                reasons.append(f"the deeper engine failed: {type(err).__name__}")
        state = "unscanned" if reasons else "findings" if findings else "clean"
        told: dict[str, Any] = {"state": state, "num_blocks": len(blocks), "num_findings": len(findings)}
        if reasons:
            told["reason"] = "; ".join(dict.fromkeys(reasons))[:256]
        return {**told, "findings": findings[:MAX_FINDINGS]}

    async def _ask(self, named: dict[str, tuple[int, str]]) -> list[dict[str, Any]]:
        folder = await asyncio.to_thread(_lay_out, {name: source for name, (_, source) in named.items()})
        try:
            output = await self._run_engine(folder)
        finally:
            shutil.rmtree(
                folder, ignore_errors=True
            )  # in memory, and awaited by nobody: a cancelled scan removes it too
        return _parse(output, {name: number for name, (number, _) in named.items()})

    async def _run_engine(self, folder: Path) -> bytes:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "server.confined",
            str(self._memory_bytes), str(int(self._timeout_s) + 1), str(os.getpid()),
            str(self._executable), "scan", "--config", str(self._rules), "--json", "--quiet", "--metrics", "off",
            "--disable-version-check", "--no-git-ignore", "--jobs", "1", "code",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
            cwd=folder, env=_environment(folder), start_new_session=True,
        )  # fmt: skip
        try:
            async with asyncio.timeout(self._timeout_s):
                output = await _read(process)
                code = await process.wait()
        except TimeoutError as err:
            raise NoVerdictError(f"the deeper engine took longer than {self._timeout_s:g} s") from err
        finally:  # whatever it started goes with it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        if code:
            raise NoVerdictError(f"the deeper engine ended with code {code}")
        return output


def _lay_out(sources: dict[str, str]) -> Path:
    """Write the code into a private folder in memory; whoever calls removes it."""
    if not _SHARED_MEMORY.is_dir():
        raise NoVerdictError("there is no /dev/shm to put the code in")
    folder = Path(tempfile.mkdtemp(prefix="strongroom-deeper-", dir=_SHARED_MEMORY))
    try:
        (folder / "code").mkdir()
        for name, source in sources.items():
            (folder / "code" / name).write_text(source, encoding="utf-8", errors="replace")
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _environment(folder: Path) -> dict[str, str]:
    """Return what the engine may know: nothing of ours but the way to the module that confines it."""
    return {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PATH": "/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "SEMGREP_SEND_METRICS": "off",
        "SEMGREP_ENABLE_VERSION_CHECK": "0",
    }


async def _read(process: asyncio.subprocess.Process) -> bytes:
    output = b""
    while process.stdout is not None and (piece := await process.stdout.read(65536)):
        output += piece
        if len(output) > _MAX_OUTPUT_BYTES:
            raise NoVerdictError(f"the deeper engine said more than {_MAX_OUTPUT_BYTES} bytes")
    return output


def _parse(output: bytes, numbers: dict[str, int]) -> list[dict[str, Any]]:
    """Return the findings; anything but a whole verdict on every file is none."""
    try:
        said = json.loads(output)
        scanned = {Path(path).name for path in said["paths"]["scanned"]}
        errors = said["errors"]
        findings = [
            {
                "block": numbers[Path(found["path"]).name],
                "rule": str(found["check_id"]).rpartition(".")[2][:96],
                "severity": _SEVERITIES.get(found["extra"]["severity"], "high"),
                "cwe": str(found["extra"]["metadata"].get("cwe", ""))[:16] or None,
                "line": int(found["start"]["line"]),
            }
            for found in said["results"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise NoVerdictError("the deeper engine's answer is not in its form") from err
    if errors:
        raise NoVerdictError("the deeper engine could not read all of the code")
    if scanned != set(numbers):
        raise NoVerdictError("the deeper engine left out a part of the code")
    return findings


async def _tell(record: Callable[..., Awaitable[Any]], request_id: str, told: dict[str, Any]) -> None:
    with contextlib.suppress(AuditUnavailableError):  # the log is down, and nothing else is answered either
        await record(EVENT, request_id=request_id, engine="semgrep", **told)
