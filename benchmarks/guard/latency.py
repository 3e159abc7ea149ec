"""What the guard costs: a streamed token of prose, and a closed block of 40 lines in every language.

A block is a labelled program of that length, or near it. Each is judged some times in this process (processor time),
and through a worker as the gateway does it (wall time, the pipes included).
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import statistics
import sys
import time

from benchmarks.guard.rates import CASES, Pair, load_pairs
from server.guard import code, release, scan
from server.guard.worker import settle
from server.guard.workers import WorkerPool
from server.types import Chat, Delta, ModelRequest, Outcome, ScanMode, WireFormat

PROSE = (
    "The function reads the file line by line, keeps what it needs, and returns a list of records that the caller can "
    "sort. It does not hold the whole file in memory, so it works for large inputs as well. If a line is empty it is "
    "left out; if a line cannot be read, the error says which one it was and the work goes on with the next. "
)
MAX_BLOCKS, NUM_LINES = 24, 40
REQUEST = ModelRequest(WireFormat.CHAT, "m", Chat(({"role": "user", "content": "x"},)), {})


async def _judge(source: str, language: str | None) -> scan.CodeScan:
    return scan.scan_code(source, language)


def token_us(mode: ScanMode | None, *, num_repeats: int = 40) -> list[float]:
    """Return microseconds a token for each run; None passes the deltas on without the guard."""
    words = [word + " " for word in (PROSE * 4).split(" ")]

    async def play() -> float:
        async def deltas():
            for start in range(0, len(words), 4):
                yield [Delta(0, word) for word in words[start : start + 4]]

        source = deltas()
        stream = (
            source
            if mode is None
            else release.released(source, REQUEST, mode, Outcome(), scan_code=_judge, repair=None)
        )
        begin = time.process_time()
        async for _ in stream:
            pass
        return (time.process_time() - begin) / len(words) * 1e6

    return [asyncio.run(play()) for _ in range(num_repeats)]


@functools.cache
def all_pairs() -> list[Pair]:
    """Return the labelled twins of all sets, read once."""
    folders = [CASES, *sorted(path for path in (CASES / "held-out").iterdir() if path.is_dir())]
    return [pair for folder in folders for pair in load_pairs(folder)]


def blocks(language: str) -> list[str]:
    """Return the labelled programs whose length is nearest to 40 lines."""
    programs = [text for pair in all_pairs() if pair.language == language for text in (pair.insecure, pair.safe)]
    return sorted(programs, key=lambda text: abs(len(text.splitlines()) - NUM_LINES))[:MAX_BLOCKS]


def block_ms(language: str, *, num_repeats: int = 5) -> list[float]:
    """Return milliseconds of processor time for each block: the median of some turns after a first."""
    times = []
    for source in blocks(language):
        turns = []
        for _ in range(num_repeats + 1):
            begin = time.process_time()
            code.find_insecure(source, language)
            turns.append((time.process_time() - begin) * 1e3)
        times.append(statistics.median(turns[1:]))
    return times


async def worker_ms(languages: list[str], *, num_repeats: int = 5) -> dict[str, list[float]]:
    """Return milliseconds from asking a worker to its verdict, for each block of each language."""
    pool = WorkerPool(num_workers=1)
    await pool.warm()
    times: dict[str, list[float]] = {}
    for language in languages:
        times[language] = []
        for source in blocks(language):
            turns = []
            for _ in range(num_repeats + 1):
                begin = time.perf_counter()
                _, error = await pool.scan_code(source, language)
                turns.append((time.perf_counter() - begin) * 1e3)
                if error is not None:
                    raise RuntimeError(error)
            times[language].append(statistics.median(turns[1:]))
    await pool.close()
    return times


def main() -> int:
    """Print the figures, as text or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    base = statistics.median(token_us(None))
    rows: dict[str, float | list[float]] = {
        f"token of prose, {mode.value} (us)": round(statistics.median(token_us(mode)) - base, 2)
        for mode in (ScanMode.ANNOTATE, ScanMode.BLOCK)
    }
    languages = sorted({pair.language for pair in all_pairs()})
    settle()
    through_worker = asyncio.run(worker_ms(languages))
    for language in languages:
        for where, times in (("", block_ms(language)), (", in a worker", through_worker[language])):
            rows[f"block of 40 lines, {language}{where} (ms)"] = [
                round(statistics.median(times), 2),
                round(statistics.quantiles(times, n=10)[-1], 2),
            ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(f"{'':50} median   90 %")
    for name, value in rows.items():
        cells = value if isinstance(value, list) else [value]
        print(f"{name:50}" + "".join(f"{cell:7.2f}" for cell in cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
