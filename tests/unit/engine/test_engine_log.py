"""What of an engine's output reaches its log file."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from server.engine import log
from server.engine.log import ChildLog, LineFilter

if TYPE_CHECKING:
    from pathlib import Path

PREFIX = b"(APIServer pid=14559) ERROR 11-22 21:21:30 [serving.py:929] "
LISTENS = b"INFO:     Application startup complete."


def kept(*lines: bytes) -> bytes:
    chosen = LineFilter()
    chosen.keep(LISTENS)
    return b"".join(map(chosen.keep, lines))


def test_everything_is_kept_until_it_listens() -> None:
    chosen = LineFilter()
    for line in (b"", b"ValueError: no such file", PREFIX + b"out of memory", LISTENS):
        assert chosen.keep(line) == line + b"\n"
    assert chosen.keep(b"CANARY") == b""


@pytest.mark.parametrize(
    "line",
    [
        b"CANARY",
        b"[21:21:30] /project/cpp/fsm_builder.cc:1311: Warning: ignored in regex: CANARY",
        PREFIX + b"Error in request CANARY",
        PREFIX + b"    raise CANARY",
        PREFIX + b"error: CANARY",
        PREFIX + b"CANARY: (?=a)b((",
        b"(APIServer pid=1) WARNING 11-22 21:21:30 [chat.py:9] odd field CANARY",
        b'INFO:     127.0.0.1:1 - "POST /CANARY HTTP/1.1" 200 OK',
        b"XError: CANARY",
    ],
)
def test_texts_are_withheld(line: bytes) -> None:
    assert kept(line) == b""


def test_frames_and_kinds_of_exceptions_are_kept() -> None:
    frame = b'  File "/x/vllm/engine.py", line 464, in process'
    assert kept(PREFIX + frame) == PREFIX + frame + b"\n"
    assert (
        kept(PREFIX + b"vllm.exceptions.VLLMValidationError: CANARY")
        == PREFIX + b"vllm.exceptions.VLLMValidationError\n"
    )
    assert kept(PREFIX + b"RuntimeError") == PREFIX + b"RuntimeError\n"


def test_numbers_are_kept_and_gaps_are_shown() -> None:
    line = b"(APIServer pid=1) INFO 11-22 21:21:27 [loggers.py:335] Engine 000: Avg prompt throughput: 11.4 tokens/s"
    assert kept(b"CANARY", b"CANARY", line, line) == b"(2 lines withheld)\n" + line + b"\n" + line + b"\n"


async def test_the_file_is_private_and_turned_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MAX_LOG_BYTES", 1000)
    path = tmp_path / "engine.log"
    child_log = ChildLog(path)
    writer = child_log.open()
    for index in range(30):
        os.write(writer, b"%03d %b\n" % (index, b"x" * 95))
        await asyncio.sleep(0)
    os.write(writer, b"the end without its newline")
    os.close(writer)
    child_log.close()
    newest, older = path.read_bytes(), path.with_name("engine.log.1").read_bytes()
    assert len(newest) <= 1000
    assert len(older) <= 1000
    assert newest.endswith(b"the end without its newline\n")
    assert path.stat().st_mode & 0o777 == 0o600


async def test_an_endless_line_is_cut(tmp_path: Path) -> None:
    child_log = ChildLog(tmp_path / "engine.log")
    writer = child_log.open()
    task = asyncio.to_thread(os.write, writer, b"x" * 300_000)
    await task
    os.close(writer)
    await asyncio.sleep(0)
    child_log.close()
    assert (tmp_path / "engine.log").stat().st_size >= 300_000


async def test_a_log_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "engine.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        ChildLog(tmp_path / "engine.log").open()
