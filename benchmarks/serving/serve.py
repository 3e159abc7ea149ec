"""Measure any OpenAI-compatible server with requests of coding tools.

    . .strongroom/client.env; strongroom bench serve --rate 2 --duration 30 --workload mixed --goodput ttft:500 tpot:60
    strongroom bench serve --url http://gpu-box:8000/v1 --model coder --callers 8 --workload edit --json edit.json
    strongroom bench serve --search --goodput ttft:300 e2e:4000 --duration 20 --html report.html

The address, model and key come from OPENAI_BASE_URL, MODEL and OPENAI_API_KEY unless given. Open loop with --rate (and
--arrivals) or --trace, closed loop with --callers. With --search the highest rate is looked for that keeps the limits
of --goodput for the share --attain of requests. Exit code 3: requests failed, and more than --max-errors of them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop

from benchmarks.report import write_html
from benchmarks.result import Measure, Result, finish, write_result
from benchmarks.serving.arrivals import Arrival, arrivals, load_trace
from benchmarks.serving.client import Client, Target
from benchmarks.serving.drive import Progress, Run, closed_loop, open_loop
from benchmarks.serving.metrics import Limits, error_counts, measures, row
from benchmarks.serving.workloads import MIXED, WORKLOADS, Options, corpus_digest, parse_mix, requests

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_SEARCH_RUNS = 16
LATE_MS = 10.0


@dataclass(frozen=True)
class Plan:
    """One run: against what, with what, how."""

    target: Target
    options: Options
    mix: dict[str, float]
    seed: int
    warm_s: float
    duration_s: float
    max_in_flight: int
    timeout_s: float
    drain_s: float


async def run_open(plan: Plan, schedule: Sequence[Arrival], what: str) -> Run:
    """One open-loop run."""
    client = Client(plan.target, timeout_s=plan.timeout_s)
    total_s = plan.warm_s + plan.duration_s
    try:
        return await open_loop(
            client,
            schedule,
            requests(plan.mix, plan.options, seed=plan.seed),
            warm_s=plan.warm_s,
            duration_s=total_s,
            max_in_flight=plan.max_in_flight,
            drain_s=plan.drain_s,
            progress=Progress(what, total_s),
        )
    finally:
        client.close()


async def run_rate(plan: Plan, kind: str, rate: float) -> Run:
    """One open-loop run at a mean rate."""
    schedule = arrivals(kind, rate, plan.warm_s + plan.duration_s, seed=plan.seed)
    return await run_open(plan, schedule, f"{rate:g} requests/s")


async def run_closed(plan: Plan, callers: int, num_requests: int | None) -> Run:
    """One closed-loop run."""
    client = Client(plan.target, timeout_s=plan.timeout_s)
    total_s = plan.warm_s + plan.duration_s
    try:
        return await closed_loop(
            client,
            requests(plan.mix, plan.options, seed=plan.seed),
            callers=callers,
            warm_s=plan.warm_s,
            duration_s=total_s,
            num_requests=num_requests,
            progress=Progress(f"{callers} callers", total_s),
        )
    finally:
        client.close()


async def search(
    plan: Plan, kind: str, limits: Limits, start: float, attain: float
) -> tuple[float, list[tuple[float, Run]]]:
    """The highest rate at which the share `attain` of requests keeps the limits: doubled until it breaks, then halved.

    Returns:
        The rate (0 where even the lowest tried one breaks them), and every run.
    """
    tried: list[tuple[float, Run]] = []
    good, bad = 0.0, math.inf
    rate = start
    while len(tried) < MAX_SEARCH_RUNS and (bad == math.inf or bad - good > 0.08 * bad):
        run = await run_rate(plan, kind, rate)
        tried.append((rate, run))
        samples = run.measured
        kept = bool(samples) and sum(limits.are_kept(sample) for sample in samples) >= attain * len(samples)
        print(f"{rate:.3g} requests/s: limits {'kept' if kept else 'broken'}", file=sys.stderr, flush=True)
        good, bad = (rate, bad) if kept else (good, rate)
        rate = good * 2 if bad == math.inf else (good + bad) / 2 if good else bad / 4
        if rate * (plan.warm_s + plan.duration_s) < 4:
            break  # too few requests to say anything
    return good, tried


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `serve` and `sweep` have in common."""
    environ = os.environ
    parser.add_argument("--url", default=environ.get("OPENAI_BASE_URL"), help="http(s)://HOST:PORT/v1 or unix:///PATH")
    parser.add_argument("--model", default=environ.get("MODEL"))
    parser.add_argument("--key-env", default="OPENAI_API_KEY", help="the variable that holds the key")
    parser.add_argument("--ca", help="CA file of an https server")
    parser.add_argument("--workload", default="mixed", help=f"{', '.join(WORKLOADS)}, a mix, or mixed: {MIXED}")
    parser.add_argument("--arrivals", default="poisson", help="poisson, uniform or burst:N")
    parser.add_argument("--duration", type=float, default=30.0, help="measured seconds")
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds before, not measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--goodput", nargs="*", default=[], metavar="NAME:MS", help="limits, e.g. ttft:500 tpot:50 e2e:9000"
    )
    parser.add_argument("--max-tokens", type=int, help="of an answer; default: what suits the workload")
    parser.add_argument("--max-prompt-chars", type=int, default=8_000)
    parser.add_argument("--fim", default="suffix", help="suffix, or a prompt with {prefix} and {suffix} in it")
    parser.add_argument("--ignore-eos", action="store_true", help="always max_tokens tokens (vLLM)")
    parser.add_argument("--no-stream", action="store_true", help="ask for whole answers")
    parser.add_argument("--max-in-flight", type=int, default=2048)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one answer")
    parser.add_argument("--drain", type=float, default=60.0, help="seconds to wait after the last arrival")
    parser.add_argument("--max-errors", type=float, default=0.0, help="share of failed requests that is no failure")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--html", type=Path, help="write a report here")


def plan_of(args: argparse.Namespace) -> Plan:
    """What the arguments ask for.

    Raises:
        ValueError: They contradict themselves or lack something.
    """
    if not args.url or not args.model:
        raise ValueError("--url and --model are needed, or OPENAI_BASE_URL and MODEL in the environment")
    if (
        min(args.duration, args.timeout, args.max_in_flight, args.max_prompt_chars) <= 0
        or min(args.warm_up, args.drain) < 0
    ):
        raise ValueError("durations, times and bounds must be above 0")
    if args.max_prompt_chars < 1_000:
        raise ValueError("--max-prompt-chars must be at least 1000; no real prompt of a coding tool is shorter")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise ValueError("--max-tokens must be at least 1")
    if args.fim != "suffix" and not ("{prefix}" in args.fim and "{suffix}" in args.fim):
        raise ValueError("--fim must be suffix, or hold {prefix} and {suffix}")
    options = Options(args.model, args.max_tokens, args.max_prompt_chars, not args.no_stream, args.fim, args.ignore_eos)
    target = Target.parse(args.url, key=os.environ.get(args.key_env, ""), ca=args.ca)
    return Plan(
        target,
        options,
        parse_mix(args.workload),
        args.seed,
        args.warm_up,
        args.duration,
        args.max_in_flight,
        args.timeout,
        args.drain,
    )


def settings_of(plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to run the same again; never the key."""
    return {
        "target": plan.target.label,
        "model": plan.options.model,
        "workload": plan.mix,
        "corpus_sha256": corpus_digest(),
        "seed": plan.seed,
        "warm_up_s": plan.warm_s,
        "duration_s": plan.duration_s,
        "max_tokens": plan.options.max_tokens,
        "max_prompt_chars": plan.options.max_prompt_chars,
        "stream": plan.options.stream,
        "ignore_eos": plan.options.ignore_eos,
        "max_in_flight": plan.max_in_flight,
        "goodput": list(args.goodput),
        "arrivals": args.arrivals,
    }


def points(run: Run) -> dict[str, Any]:
    """What plots need of a run beside its measures."""
    samples = run.measured
    return {
        "errors": error_counts(samples),
        "max_in_flight": run.max_in_flight,
        "tokens_from_usage": all(sample.tokens_from_usage for sample in samples if sample.error is None),
    }


def show(line: dict[str, Any]) -> None:
    """One line for people."""
    print("  ".join(f"{name}={value}" for name, value in line.items()), flush=True)


def judge(runs: Sequence[Run], max_errors: float) -> int:
    """The exit code: 3 where nothing was measured or too much of it failed; says so."""
    samples = [sample for run in runs for sample in run.measured]
    failed = [sample for sample in samples if sample.error is not None]
    late = sorted((sample.sent_s - sample.due_s) * 1000 for sample in samples)
    if late and late[int(len(late) * 0.99)] > LATE_MS:
        print(
            f"note: one request in a hundred was sent {late[int(len(late) * 0.99)]:.0f} ms late or more; latencies "
            "count from when it was due. The machine that sends may be too slow, or --max-in-flight too small.",
            file=sys.stderr,
        )
    if not samples:
        print(
            "Nothing was measured: no request was due after the warm-up. Raise --rate or --duration.", file=sys.stderr
        )
        return 3
    if len(failed) > max_errors * len(samples):
        kinds = ", ".join(f"{kind}: {count}" for kind, count in error_counts(samples).items())
        print(f"{len(failed)} of {len(samples)} requests failed ({kinds}).", file=sys.stderr)
        return 3
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="strongroom bench serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--rate", type=float, help="open loop: requests a second")
    how.add_argument("--callers", type=int, help="closed loop: requests in flight")
    how.add_argument("--trace", type=Path, help="open loop: a recorded trace")
    how.add_argument("--search", action="store_true", help="look for the highest rate that keeps the limits")
    parser.add_argument("--requests", type=int, help="closed loop: stop after so many")
    parser.add_argument("--from-rate", type=float, default=1.0, help="where the search begins")
    parser.add_argument("--attain", type=float, default=0.95, help="share of requests that must keep the limits")
    return parser


def measure(args: argparse.Namespace) -> tuple[Result, list[Run]]:
    """Run what the arguments ask for.

    Raises:
        ValueError: They make no sense.
    """
    plan = plan_of(args)
    limits = Limits.parse(args.goodput)
    settings = settings_of(plan, args)
    named: list[tuple[dict[str, str], Run]] = []
    found: list[Measure] = []
    if args.search:
        if not args.goodput or not 0 < args.attain <= 1 or not args.from_rate > 0:
            raise ValueError("--search needs --goodput, an --attain above 0 and at most 1, and a --from-rate above 0")
        settings |= {"search_from": args.from_rate, "attain": args.attain}
        best, tried = uvloop.run(search(plan, args.arrivals, limits, args.from_rate, args.attain))
        named = [({"rate": f"{rate:g}"}, run) for rate, run in sorted(tried, key=lambda pair: pair[0])]
        found.append(Measure("highest_rate", "1/s", "higher", "total", best))
    elif args.callers is not None:
        if args.callers < 1 or (args.requests is not None and args.requests < 1):
            raise ValueError("--callers and --requests must be at least 1")
        settings |= {"callers": args.callers, "requests": args.requests}
        named = [({"callers": str(args.callers)}, uvloop.run(run_closed(plan, args.callers, args.requests)))]
    elif args.trace is not None:
        schedule = load_trace(args.trace)
        plan = Plan(**{**plan.__dict__, "duration_s": max(schedule[-1].at_s - plan.warm_s, 1.0)})
        settings |= {"arrivals": "trace", "duration_s": plan.duration_s}
        named = [({"trace": args.trace.name}, uvloop.run(run_open(plan, schedule, args.trace.name)))]
    else:
        rate = args.rate if args.rate is not None else 1.0
        settings |= {"rate": rate}
        named = [({"rate": f"{rate:g}"}, uvloop.run(run_rate(plan, args.arrivals, rate)))]
    rows = []
    for labels, run in named:
        found += measures(run, limits, labels)
        rows.append({**labels, **row(run, limits)})
        show(rows[-1])
    details = {"runs": [{"labels": labels, **points(run)} for labels, run in named]}
    return finish(Result("serve", settings, found, rows, details)), [run for _, run in named]


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        result, runs = measure(args)
    except ValueError as err:
        parser.error(str(err))
    if args.search:
        print(f"highest rate that keeps the limits: {result.measures[0].value:.3g} requests/s")
    if args.json:
        write_result(result, args.json)
    if args.html:
        write_html([result], args.html)
    # A search goes on to where requests fail; that is what it looks for.
    return 0 if args.search and result.measures[0].value else judge(runs, args.max_errors)


if __name__ == "__main__":
    sys.exit(main())
