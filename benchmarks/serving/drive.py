"""Sends requests in an open or a closed loop and keeps one sample each.

Open loop: a request is due at its scheduled moment, and every latency counts from there. When the server stalls, or the
bound on requests in flight is reached, what had to wait is charged for it; one that counts from the moment of sending
would leave exactly the worst moments out (coordinated omission). Closed loop: so many callers, each of which
sends when its last answer is there; a request is due when it is sent.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.serving.client import Answer, AnswerError, Client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.serving.arrivals import Arrival
    from benchmarks.serving.workloads import Request

PROGRESS_S = 0.5
QUIET_PROGRESS_S = 15.0


@dataclass(frozen=True)
class Sample:
    """One request. Moments are seconds from the run's start.

    Attributes:
        workload: What kind of request.
        due_s: When it should have been sent.
        sent_s: When it was.
        end_s: When its last event came, or when it failed.
        texts_s: When each event with text came.
        output_tokens: As the server counted, or the events with text where it does not say.
        error: What kind of error; None for a whole answer.
    """

    workload: str
    due_s: float
    sent_s: float
    end_s: float
    texts_s: Sequence[float] = ()
    prompt_tokens: int | None = None
    output_tokens: int = 0
    cached_tokens: int | None = None
    tokens_from_usage: bool = True
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """From the due moment to the first text."""
        return self.texts_s[0] - self.due_s if self.texts_s else None

    @property
    def e2e_s(self) -> float:
        """From the due moment to the last event."""
        return self.end_s - self.due_s

    @property
    def last_text_s(self) -> float | None:
        """From the due moment to the last text."""
        return self.texts_s[-1] - self.due_s if self.texts_s else None

    @property
    def tpot_s(self) -> float | None:
        """Seconds for each token after the first."""
        if len(self.texts_s) < 2 or self.output_tokens < 2:
            return None
        return (self.texts_s[-1] - self.texts_s[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Between events with text."""
        return [after - before for before, after in zip(self.texts_s, self.texts_s[1:], strict=False)]


@dataclass
class Run:
    """What a run gave. Samples that were due before `warm_s` are left out by everything that reads them."""

    warm_s: float
    end_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    max_in_flight: int = 0
    last_due_s: float = 0.0

    @property
    def measured(self) -> list[Sample]:
        """The samples after the warm-up."""
        return [sample for sample in self.samples if sample.due_s >= self.warm_s]


class Progress:
    """One line on a terminal, rewritten; elsewhere a line now and then."""

    def __init__(self, what: str, total_s: float) -> None:
        self._what = what
        self._total_s = total_s
        self._tty = sys.stderr.isatty()

    async def watch(self, run: Run, running: Callable[[], int], start_s: float) -> None:
        """Show how far the run is until cancelled."""
        pause_s = PROGRESS_S if self._tty else QUIET_PROGRESS_S
        while True:
            await asyncio.sleep(pause_s)
            self.show(run, running(), time.perf_counter() - start_s)

    def show(self, run: Run, running: int, now_s: float) -> None:
        """Write the line."""
        failed = sum(sample.error is not None for sample in run.samples)
        phase = "warm-up" if now_s < run.warm_s else "measuring" if now_s < self._total_s else "draining"
        line = (
            f"{self._what}: {phase} {now_s:.0f}/{self._total_s:.0f} s, {len(run.samples)} answered, "
            f"{failed} failed, {running} running"
        )
        print(f"\r\x1b[K{line}" if self._tty else line, end="" if self._tty else "\n", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Take the line off the terminal."""
        if self._tty:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


async def _ask(client: Client, request: Request, due_s: float, start_s: float) -> Sample:
    sent_s = time.perf_counter() - start_s
    try:
        answer: Answer = await client.ask(request.route, request.body, stream=request.stream)
    except AnswerError as err:
        return Sample(request.workload, due_s, sent_s, time.perf_counter() - start_s, error=str(err))
    return Sample(
        request.workload,
        due_s,
        answer.sent_s - start_s,
        answer.end_s - start_s,
        [moment - start_s for moment in answer.texts_s],
        answer.prompt_tokens,
        answer.output_tokens,
        answer.cached_tokens,
        answer.tokens_from_usage,
    )


async def open_loop(
    client: Client,
    schedule: Sequence[Arrival],
    requests: Iterator[Request],
    *,
    warm_s: float,
    duration_s: float,
    max_in_flight: int = 2048,
    drain_s: float = 60.0,
    progress: Progress | None = None,
) -> Run:
    """Send each request at its moment.

    Args:
        client: Of the server.
        schedule: The moments, in order.
        requests: Where an arrival's request comes from, unless it brings its own.
        warm_s: What is due before is not measured.
        duration_s: How long arrivals are meant to last, the warm-up included.
        max_in_flight: More than that wait, and are charged for it.
        drain_s: How long after the last arrival answers are waited for; what is not there then counts as failed.
        progress: Shows how far it is.
    """
    run = Run(warm_s, last_due_s=schedule[-1].at_s if schedule else 0.0)
    room = asyncio.Semaphore(max_in_flight)
    tasks: set[asyncio.Task[None]] = set()
    # Made beforehand: the making of a long prompt must not delay the sending of another.
    prepared = [arrival.request or next(requests) for arrival in schedule]
    gc.collect()
    gc.freeze()
    start_s = time.perf_counter()
    watch = asyncio.create_task(progress.watch(run, lambda: len(tasks), start_s)) if progress else None
    sent = 0
    began: dict[asyncio.Task[None], tuple[str, float, float]] = {}

    async def one(request: Request, due_s: float) -> None:
        try:
            run.samples.append(await _ask(client, request, due_s, start_s))
        finally:
            room.release()

    def over(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        began.pop(task, None)

    limit_s = duration_s + drain_s
    try:
        for arrival, request in zip(schedule, prepared, strict=True):
            wait_s = arrival.at_s - (time.perf_counter() - start_s)
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                # The rest of a millisecond: uvloop rounds its timers.
                while _now(start_s) < arrival.at_s:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + limit_s - _now(start_s)):
                    await room.acquire()
            except TimeoutError:
                break
            task = asyncio.create_task(one(request, arrival.at_s))
            tasks.add(task)
            began[task] = (request.workload, arrival.at_s, _now(start_s))
            task.add_done_callback(over)
            run.max_in_flight = max(run.max_in_flight, len(tasks))
            sent += 1
        if tasks:
            await asyncio.wait(set(tasks), timeout=max(0.0, limit_s - _now(start_s)))
        unfinished = [began[task] for task in tasks if task in began]
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*list(tasks), return_exceptions=True)
        await asyncio.sleep(0)  # connections that were cut are closed in the next round of the loop
        end_s = _now(start_s)
        run.samples += [Sample(name, due_s, sent_s, end_s, error="not answered") for name, due_s, sent_s in unfinished]
        for arrival, request in list(zip(schedule, prepared, strict=True))[sent:]:
            run.samples.append(Sample(request.workload, arrival.at_s, end_s, end_s, error="not sent"))
    finally:
        gc.unfreeze()
        if watch is not None and progress is not None:
            watch.cancel()
            progress.clear()
    run.end_s = max(duration_s, max((sample.end_s for sample in run.samples), default=0.0))
    return run


def _now(start_s: float) -> float:
    return time.perf_counter() - start_s


async def closed_loop(
    client: Client,
    requests: Iterator[Request],
    *,
    callers: int,
    warm_s: float,
    duration_s: float,
    num_requests: int | None = None,
    progress: Progress | None = None,
) -> Run:
    """Keep so many requests in flight until the time, or the number of requests, is reached."""
    run = Run(warm_s, max_in_flight=callers)
    start_s = time.perf_counter()
    running = 0
    left = num_requests if num_requests is not None else sys.maxsize

    async def caller() -> None:
        nonlocal left, running
        while left > 0 and _now(start_s) < duration_s:
            left -= 1
            request = next(requests)
            due_s = _now(start_s)
            running += 1
            sample = await _ask(client, request, due_s, start_s)
            running -= 1
            run.samples.append(sample)
            if sample.error is not None:
                # A server that refuses at once must not be asked as fast as a loop can turn.
                await asyncio.sleep(0.05)

    watch = asyncio.create_task(progress.watch(run, lambda: running, start_s)) if progress else None
    try:
        await asyncio.gather(*(caller() for _ in range(callers)))
    finally:
        if watch is not None and progress is not None:
            watch.cancel()
            progress.clear()
    run.last_due_s = max((sample.due_s for sample in run.samples), default=0.0)
    run.end_s = max((sample.end_s for sample in run.samples), default=0.0)
    return run
