"""Try a few engine settings on this machine and write a profile that keeps what helped, with the evidence.

    strongroom tune --config configs/strongroom.yaml --state .strongroom-tune --out configs/models/coder-here.yaml

One setting after the other: each value is tried with the best of the others so far, in an engine that is started with
it, under the same requests of the same callers. A value is kept when the whole 95 % interval of the ratio of
its seconds per output token lies below 1; what may be chance is not kept. `--try NAME=VALUE,VALUE` replaces the grid:
names of `models[].engine`, or options of vLLM from its allow-list. Every try costs a start of the engine.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
import yaml

from benchmarks.intervals import ratio_interval
from benchmarks.result import Measure, Result, device_facts, finish, machine_facts, write_result
from benchmarks.serving.client import Target
from benchmarks.serving.metrics import Limits, row
from benchmarks.serving.serve import Plan, run_closed
from benchmarks.serving.served import DEFAULT_CONFIG, NotServedError, Served
from benchmarks.serving.workloads import Options, parse_mix
from server.errors import ConfigError
from server.settings import EngineSettings, load_settings

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

WORKLOAD = "edit=3,fim=3,agent=2"
CPU_GRID = ("speculative_ngram=4,8", "--max-num-batched-tokens=512,2048")
GPU_GRID = (
    "speculative_ngram=4,8",
    "--kv-cache-dtype=fp8",
    "--max-num-batched-tokens=4096,16384",
    "max_num_seqs=64,256",
)


@dataclass(frozen=True)
class Tried:
    """One value that was tried, and how it did against the best until then."""

    what: str
    row: dict[str, Any]
    interval: tuple[float, float] | None
    kept: bool


def parse_tries(given: Sequence[str]) -> list[tuple[str, list[Any]]]:
    """Read `speculative_ngram=4,8`.

    Raises:
        ValueError: Not a setting of the engine, or no values.
    """
    found = []
    for each in given:
        name, _, values = each.partition("=")
        parsed = [value if name.startswith("--") else yaml.safe_load(value) for value in values.split(",")]
        if (not name.startswith("--") and name not in EngineSettings.model_fields) or not values or None in parsed:
            raise ValueError(f"'{each}' is not NAME=VALUE,VALUE with a name of models[].engine or an option of vLLM")
        found.append((name, parsed))
    return found


def with_value(engine: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Engine settings with one replaced."""
    if name.startswith("--"):
        return {**engine, "extra_args": {**(engine.get("extra_args") or {}), name: value}}
    return {**engine, name: value}


def speed(row: dict[str, Any]) -> str:
    """A row in a few words."""
    return f"{row.get('output_tokens_per_s')} tokens/s, ttft p50 {row.get('ttft_p50_ms')} ms"


def tune(
    base: dict[str, Any],
    tries: Sequence[tuple[str, list[Any]]],
    measure: Callable[[dict[str, Any]], tuple[list[float], dict[str, Any]]],
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[Tried]]:
    """The settings that are kept, and everything that was tried; an interrupt ends the trying, once there is something.

    Args:
        base: Engine settings to begin with.
        tries: Names with their values.
        measure: Runs an engine with these settings; returns seconds per output token, one a request, and a row.
        say: Takes a line of progress.

    Raises:
        NotServedError: The engine does not even start with `base`.
    """
    best = dict(base)
    say("as it was: starting the engine, which may take minutes")
    values, line = measure(best)
    tried = [Tried("as it was", line, None, kept=True)]
    say(f"as it was: {speed(line)}")
    for name, options in tries:
        for option in options:
            candidate = with_value(best, name, option)
            if candidate == best:
                continue
            what = f"{name}={option}"
            say(f"{what}: starting the engine with it")
            try:
                new, line = measure(candidate)
            except (NotServedError, ConfigError) as err:
                reason = str(err).splitlines()[0][:200]
                tried.append(Tried(what, {"refused": reason}, None, kept=False))
                say(f"{what}: {reason}")
                continue
            except KeyboardInterrupt:
                say(f"{what}: interrupted; what was measured before is written")
                return best, tried
            bounds = ratio_interval(values, new, "p50")
            kept = bounds[1] < 1
            tried.append(Tried(what, line, bounds, kept))
            time = f"{bounds[0]:.3f} to {bounds[1]:.3f} of the time"
            say(f"{what}: {speed(line)}; {time}, {'kept' if kept else 'not kept'}")
            if kept:
                best, values = candidate, new
    return best, tried


def profile_text(config: Path, out: Path, engine: dict[str, Any], tried: Sequence[Tried], how: str) -> str:
    """The profile: the configuration with the engine settings that were kept, and why, above it."""
    raw = yaml.safe_load(config.read_text(encoding="utf-8"))
    found = load_settings(config)
    here = out.absolute().parent
    # Folders of rules are relative to the file they stand in; this one may stand elsewhere.
    for name, folder in (
        ("policy", found.policy.directory),
        ("templates", found.templates.directory),
        ("guard", found.guard.directory),
    ):
        raw[name] = {**(raw.get(name) or {}), "directory": os.path.relpath(folder, here)}
    raw["models"][0]["engine"] = engine
    machine = machine_facts()
    devices = ", ".join(device["name"] for device in device_facts()) or "no GPU"
    lines = [
        f"Measured by `strongroom tune` on {machine['cpu']}, {machine['num_cpus']} CPUs, {devices}: {how}.",
        "Seconds per output token against the best until then, 95 % interval; only what is wholly below 1 was kept.",
    ]
    for each in tried:
        bounds = f"{each.interval[0]:.3f} to {each.interval[1]:.3f}" if each.interval else ""
        how_it_did = each.row.get("refused") or speed(each.row)
        lines.append(f"  {each.what}: {bounds + ', ' if bounds else ''}{how_it_did}{', kept' if each.kept else ''}")
    comments = "".join(f"# {line}\n" for line in lines)
    return comments + yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="its first model is tuned")
    parser.add_argument("--state", type=Path, default=Path(".strongroom-tune"), help="its state folder")
    parser.add_argument("--out", type=Path, required=True, help="write the profile here")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--try", action="append", dest="tries", metavar="NAME=V,V", help="replaces the grid; repeat it")
    parser.add_argument("--callers", type=int, default=2, help="requests in flight")
    parser.add_argument("--seconds", type=float, default=30.0, help="measured, for each try")
    parser.add_argument("--workload", default=WORKLOAD)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--max-prompt-chars", type=int, default=3_000)


def run(args: argparse.Namespace) -> int:
    """Tune.

    Raises:
        ConfigError: The arguments or the configuration are wrong, or the engine does not start as it is.
    """
    try:
        tries = parse_tries(args.tries or (GPU_GRID if device_facts() else CPU_GRID))
        mix = parse_mix(args.workload)
    except ValueError as err:
        raise ConfigError(str(err)) from err
    if args.callers < 1 or args.seconds <= 0 or args.max_prompt_chars < 1_000 or args.max_tokens < 1:
        raise ConfigError("callers, seconds and max-tokens must be above 0, max-prompt-chars at least 1000.")
    raw = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    load_settings(args.config)
    base = dict(raw["models"][0].get("engine") or {})

    def measure(engine: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
        with Served(args.state, args.config, engine) as served:
            client = served.client
            options = Options(client["MODEL"], args.max_tokens, args.max_prompt_chars)
            target = Target.parse(client["OPENAI_BASE_URL"], key=client["OPENAI_API_KEY"])
            plan = Plan(target, options, mix, 0, args.seconds / 4, args.seconds, 1024, 300.0, 60.0)
            found = uvloop.run(run_closed(plan, args.callers, None))
        samples = [sample for sample in found.measured if sample.error is None and sample.output_tokens]
        if len(samples) < 3 or len(samples) < len(found.measured):
            raise NotServedError(f"{len(samples)} of {len(found.measured)} requests were answered; raise --seconds")
        return [sample.e2e_s / sample.output_tokens for sample in samples], dict(row(found, Limits()))

    def say(line: str) -> None:
        print(f"tune: {line}", file=sys.stderr, flush=True)

    try:
        best, tried = tune(base, tries, measure, say)
    except NotServedError as err:
        raise ConfigError(f"nothing was tuned: {err}") from err
    how = f"{args.callers} callers, {args.workload}, {args.seconds:g} s each"
    args.out.write_text(profile_text(args.config, args.out, best, tried, how), encoding="utf-8")
    load_settings(args.out)
    if args.json:
        settings = {"callers": args.callers, "seconds": args.seconds, "workload": mix, "max_tokens": args.max_tokens}
        rows = [{"try": each.what, "kept": each.kept, **each.row} for each in tried]
        ratios = [
            Measure(
                "time_ratio",
                "1",
                "lower",
                "p50",
                sum(each.interval) / 2,
                each.interval,
                {"try": each.what},
            )
            for each in tried
            if each.interval
        ]
        write_result(finish(Result("tune", settings, ratios, rows, {"engine": best})), args.json)
    print(f"{args.out}: {sum(each.kept for each in tried) - 1} of {len(tried) - 1} tries were kept")
    return 0
