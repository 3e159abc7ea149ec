"""What the guard costs: a streamed token of prose, and a closed block of 40 lines; processor time, medians."""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time

from benchmarks.guard.rates import load_pairs
from server.guard import code, release, scan
from server.types import Chat, Delta, ModelRequest, Outcome, ScanMode, WireFormat

PROSE = (
    "The function reads the file line by line, keeps what it needs, and returns a list of records that the caller can "
    "sort. It does not hold the whole file in memory, so it works for large inputs as well. If a line is empty it is "
    "left out; if a line cannot be read, the error says which one it was and the work goes on with the next. "
)
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


def block_ms(language: str, *, num_repeats: int = 15) -> list[float]:
    """Return milliseconds for a block of about 40 lines put together from the labelled cases."""
    pairs = [p for p in load_pairs() if p.language == language]
    lines: list[str] = []
    for pair in pairs:
        lines += (pair.insecure + pair.safe).splitlines()
        if len(lines) >= 40:
            break
    source = "\n".join(lines[:40])
    code.find_insecure(source, language)
    times = []
    for _ in range(num_repeats):
        begin = time.process_time()
        code.find_insecure(source, language)
        times.append((time.process_time() - begin) * 1e3)
    return times


def main() -> int:
    """Print the figures, as text or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    base = statistics.median(token_us(None))
    rows = {
        f"token of prose, {mode.value} (us)": statistics.median(token_us(mode)) - base
        for mode in (ScanMode.ANNOTATE, ScanMode.BLOCK)
    }
    for language in sorted({p.language for p in load_pairs()}):
        rows[f"block of 40 lines, {language} (ms)"] = statistics.median(block_ms(language))
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        for name, value in rows.items():
            print(f"{name:45} {value:8.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
