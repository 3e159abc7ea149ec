"""Everything on against bare vLLM on the same engine: interleaved pairs of the same rendered prompts.

    strongroom bench engine-pairs --state FOLDER --pairs 12 --json pairs.json

A pair is two rounds of the same concurrent chats, one through the gateway (key, Cedar, template, guard, durable audit),
one straight to the engine's socket with the very token ids that the gateway would send. Which comes first changes from
pair to pair. Each pair has questions of its own, so that neither arm finds the other's prompts in the prefix cache but
for the template, which both have warm. With --json of an earlier run, pairs are added to it: a long run in pieces.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import uvloop

from benchmarks.intervals import interval
from benchmarks.result import Measure, Result, ResultError, finish, load_result, write_result
from benchmarks.serving.client import Answer, AnswerError, Client, Target
from benchmarks.serving.served import DEFAULT_CONFIG, NotServedError, Served
from benchmarks.serving.workloads import functions

if TYPE_CHECKING:
    from collections.abc import Sequence

ROUTE = "chat/completions"


def questions(pair: int, chats: int) -> list[str]:
    """One question a chat; none is asked twice in a run."""
    every = functions()
    found = []
    for chat in range(chats):
        function = every[(pair * chats + chat) * 7 % len(every)]
        found.append(f"Question {pair}-{chat}. Explain this function:\n```python\n{function.source[:600]}\n```")
    return found


def bodies(served: Served, texts: Sequence[str], max_tokens: int) -> tuple[list[bytes], list[bytes], list[int]]:
    """The same requests for the gateway and for the engine, and how many tokens each prompt has."""
    model = served.client["MODEL"]
    through, bare, lengths = [], [], []
    for text in texts:
        asked: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        ids = served.rendered_ids("/v1/chat/completions", {**asked, "max_tokens": max_tokens})
        streamed = {"stream": True, "stream_options": {"include_usage": True}}
        through.append(orjson.dumps({**asked, **streamed, "max_tokens": max_tokens}))
        direct = {"model": model, "messages": [], "kv_transfer_params": {"prompt_token_ids": ids}, "temperature": 0}
        bare.append(orjson.dumps({**direct, **streamed, "max_completion_tokens": max_tokens}))
        lengths.append(len(ids))
    return through, bare, lengths


async def one_round(client: Client, requests: Sequence[bytes]) -> dict[str, Any]:
    """All chats at once."""
    started_s = time.perf_counter()
    answers: list[Answer] = await asyncio.gather(*(client.ask(ROUTE, body, stream=True) for body in requests))
    elapsed_s = time.perf_counter() - started_s
    tokens = sum(answer.output_tokens for answer in answers)
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / elapsed_s,
        "ttft_ms": statistics.fmean((answer.texts_s[0] - answer.sent_s) * 1000 for answer in answers if answer.texts_s),
        "cached_tokens": sum(answer.cached_tokens or 0 for answer in answers),
        "prompt_tokens": [answer.prompt_tokens for answer in answers],
    }


async def run_pairs(served: Served, first: int, pairs: int, chats: int, max_tokens: int) -> list[dict[str, Any]]:
    """So many pairs, after one that is not counted."""
    key = served.client["OPENAI_API_KEY"]
    through = Client(Target.parse(served.client["OPENAI_BASE_URL"], key=key), timeout_s=300)
    bare = Client(Target.parse(served.engine_url), timeout_s=300)
    rows = []
    try:
        for pair in range(first - 1, first + pairs):
            ours, theirs, lengths = await asyncio.to_thread(bodies, served, questions(pair, chats), max_tokens)
            order = [("through", through, ours), ("bare", bare, theirs)]
            found = {}
            for name, client, requests in order if pair % 2 else order[::-1]:
                found[name] = await one_round(client, requests)
                if found[name]["prompt_tokens"] != lengths:
                    raise NotServedError(
                        f"{name}: the engine computed prompts of {found[name]['prompt_tokens']} tokens, rendered were "
                        f"{lengths}: the two arms do not ask the same."
                    )
            if pair < first:
                continue  # warm-up
            row: dict[str, Any] = {"pair": pair}
            for arm, seen in found.items():
                row |= {
                    f"{arm}_{name}": round(seen[name], 3)
                    for name in ("tokens_per_s", "ttft_ms", "tokens", "cached_tokens")
                }
            rows.append(row)
            print("  ".join(f"{name}={value}" for name, value in sorted(rows[-1].items())), flush=True)
    finally:
        through.close()
        bare.close()
    return rows


def measures(rows: Sequence[dict[str, Any]]) -> list[Measure]:
    """Ratio of throughput and difference of the time to first token, pair by pair."""
    ratios = [row["through_tokens_per_s"] / row["bare_tokens_per_s"] for row in rows]
    more = [row["through_ttft_ms"] - row["bare_ttft_ms"] for row in rows]
    share = [row["through_ttft_ms"] / row["bare_ttft_ms"] for row in rows]
    found = []
    for name, unit, better, values in (
        ("throughput_ratio", "1", "higher", ratios),
        ("ttft_difference", "ms", "lower", more),
        ("ttft_ratio", "1", "lower", share),
    ):
        for statistic in ("mean", "p50"):
            value = statistics.fmean(values) if statistic == "mean" else statistics.median(values)
            found.append(Measure(name, unit, better, statistic, value, interval(values, statistic), values=values))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="strongroom bench engine-pairs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    parser.add_argument("--state", type=Path, help="kept between runs: the sealed model stays (default: a new one)")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--chats", type=int, default=8, help="at the same time")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--json", type=Path, help="write the result here; pairs of an earlier run are kept")
    args = parser.parse_args(argv)
    if min(args.pairs, args.chats, args.max_tokens) < 1:
        parser.error("--pairs, --chats and --max-tokens must be at least 1")
    settings = {"chats": args.chats, "max_tokens": args.max_tokens, "config": args.config.name}
    rows: list[dict[str, Any]] = []
    try:
        if args.json and args.json.exists():
            before = load_result(args.json)
            if before.benchmark != "engine-pairs" or before.settings != settings:
                parser.error(f"{args.json} is of another benchmark or other settings; name a new file")
            rows = [dict(row) for row in before.rows]
        first = max((int(row["pair"]) for row in rows), default=0) + 1
        functions()  # parsed before the engine starts
        with (
            tempfile.TemporaryDirectory(prefix="sr-pairs-") as scratch,
            Served(args.state or Path(scratch) / "state", args.config) as served,
        ):
            rows += uvloop.run(run_pairs(served, first, args.pairs, args.chats, args.max_tokens))
    except (NotServedError, ResultError, AnswerError, json.JSONDecodeError) as err:
        print(f"engine-pairs: {err}", file=sys.stderr)
        return 2
    result = finish(Result("engine-pairs", settings, measures(rows), rows))
    for measure in result.measures:
        low, high = measure.interval or (measure.value, measure.value)
        print(f"{measure.name} {measure.statistic}: {measure.value:.4f} [{low:.4f}, {high:.4f}], {len(rows)} pairs")
    if args.json:
        write_result(result, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
