"""New memory is made present without touching what it holds, and nothing waits for it."""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from server.sealed import memory, populate
from server.sealed.memory import HUGE_PAGE_BYTES
from server.sealed.populate import Populated
from tests.unit.sealed.workshop import load, open_workshop, plaintext, small_source

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20


class Memory:
    """Anonymous memory that nobody has touched."""

    def __init__(self, num_bytes: int) -> None:
        self.map = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.num_bytes = num_bytes

    def present_bytes(self, offset: int = 0, num_bytes: int | None = None) -> int:
        pages = -(-(num_bytes or self.num_bytes) // mmap.PAGESIZE)
        told = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = ctypes.c_void_p(self.address + offset), ctypes.c_size_t(pages * mmap.PAGESIZE), told
        assert libc.mincore(*arguments) == 0
        return sum(page & 1 for page in told) * mmap.PAGESIZE


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def test_memory_is_present_and_what_was_written_stays(pool: ThreadPoolExecutor) -> None:
    new = Memory(24 * MIB)
    new.map[5 * MIB : 5 * MIB + 4] = b"here"
    assert new.present_bytes() < 8 * MIB
    with Populated([(new.address, new.num_bytes)], pool):
        pool.shutdown()
    assert new.present_bytes() == new.num_bytes
    assert new.map[5 * MIB : 5 * MIB + 4] == b"here"
    assert new.map[:4] == bytes(4)


def test_nothing_beside_a_range_is_touched(pool: ThreadPoolExecutor) -> None:
    new = Memory(4 * MIB)
    with Populated([(new.address + MIB + 100, MIB)], pool):
        pool.shutdown()
    assert new.present_bytes() <= MIB
    assert new.present_bytes(MIB + mmap.PAGESIZE, MIB - mmap.PAGESIZE) == MIB - mmap.PAGESIZE


def test_without_threads_nothing_is_made_present_but_one_page(pool: ThreadPoolExecutor) -> None:
    del pool
    new = Memory(24 * MIB)
    with Populated([(new.address, new.num_bytes)], None):
        assert new.present_bytes() <= HUGE_PAGE_BYTES


def test_the_last_is_made_present_first_and_close_begins_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    steps: list[int] = []

    def slowly(address: int, num_bytes: int) -> None:
        del num_bytes
        steps.append(address)
        begun.set()
        assert go_on.wait(30)

    new = Memory(20 * MIB)
    monkeypatch.setattr(Populated, "_try_large_page", lambda _: False)
    monkeypatch.setattr(populate, "populate", slowly)
    with ThreadPoolExecutor(1) as pool:
        populated = Populated([(new.address, MIB), (new.address + MIB, 19 * MIB)], pool)
        assert begun.wait(30)
        closing = threading.Thread(target=populated.close)
        closing.start()
        go_on.set()
        closing.join(30)
        assert not closing.is_alive()
    assert steps == [new.address + MIB + 16 * MIB]


def test_the_largest_comes_before_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    monkeypatch.setattr(Populated, "_try_large_page", lambda _: False)
    monkeypatch.setattr(populate, "populate", lambda address, _: steps.append(address))
    with ThreadPoolExecutor(1) as pool, Populated([(1, MIB), (2 * MIB, 9 * MIB), (3, MIB), (4, 2 * MIB)], pool):
        pool.shutdown()
    assert steps == [10 * MIB, 2 * MIB, 4, 3, 1]


class Kernel:
    """Gives large pages as quickly as it is told to, by a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> None:
        self.asked: list[bool] = []
        self.now = 0.0
        self.seconds = seconds
        monkeypatch.setattr(populate, "advise_huge_pages", lambda _a, _n, wanted=True: self.asked.append(wanted))
        monkeypatch.setattr(populate, "populate", self.populate)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def populate(self, address: int, num_bytes: int) -> None:
        del address, num_bytes
        self.now += self.seconds.pop(0)


@pytest.mark.parametrize(("seconds", "wanted"), [(0.0005, [True, True, True]), (0.002, [True])])
def test_large_pages_are_asked_for_only_where_one_comes_quickly(
    seconds: float, wanted: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Memory(MIB), Memory(8 * MIB)
    with monkeypatch.context() as patch:
        kernel = Kernel(patch, [seconds])
        Populated([(first.address, first.num_bytes), (second.address, second.num_bytes)], None).close()
    assert kernel.asked == wanted  # the one that is tried, then all


def test_once_large_pages_come_slowly_no_more_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    new = Memory(16 * MIB)
    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        kernel = Kernel(patch, [0.0001, 0.001, 0.02])
        with Populated([(new.address, new.num_bytes)], pool):
            pool.shutdown()
    assert kernel.asked == [True, True, False]


def test_much_memory_gets_large_pages_as_it_is_filled(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kernel = Kernel(patch, [])
        with Populated([(1 << 40, 1 << 30), (1 << 41, MIB)], pool):
            pool.shutdown()
    assert kernel.asked == [True, True]


def test_a_kernel_that_can_not_is_no_error(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        @staticmethod
        def madvise(*_: Any) -> int:
            return -1

    monkeypatch.setattr(memory, "_libc", Libc)
    new = Memory(8 * MIB)
    with Populated([(new.address, new.num_bytes), (0, 0)], pool):
        pool.shutdown()
    assert new.present_bytes() == 0


@pytest.mark.parametrize(
    ("offset", "num_bytes", "expected"),
    [
        (0, 4 * MIB, (0, 4 * MIB)),
        (64, 4 * MIB, (2 * MIB, 2 * MIB)),
        (-64, 6 * MIB, (0, 4 * MIB)),
        (64, 2 * MIB, None),
        (0, 2 * MIB - 1, None),
        (0, 0, None),
    ],
)
def test_only_whole_large_pages_inside_a_range_are_advised(
    offset: int, num_bytes: int, expected: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []

    class Libc:
        @staticmethod
        def madvise(first: Any, length: Any, advice: int) -> int:
            asked.append((first.value - 64 * MIB, length.value, advice))
            return -1  # refused: no more than a hint

    monkeypatch.setattr(memory, "_libc", Libc)
    memory.advise_huge_pages(64 * MIB + offset, num_bytes)
    memory.advise_huge_pages(64 * MIB + offset, num_bytes, wanted=False)
    assert asked == ([] if expected is None else [(*expected, 14), (*expected, 15)])  # MADV_HUGEPAGE, MADV_NOHUGEPAGE


def test_a_tensor_does_not_wait_for_threads_that_are_at_other_work(tmp_path: Path) -> None:
    go_on = threading.Event()
    workshop = open_workshop(tmp_path)
    sealed = workshop.seal()
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(go_on.wait, 60)
        try:
            assert load(sealed, workshop, pool=pool) == plaintext(small_source())
            assert not busy.done()
        finally:
            go_on.set()
