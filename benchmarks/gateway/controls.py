"""What each control adds to a request, alone on the machine: one gateway, a caller for each step, a control more each.

    strongroom bench controls --rounds 7 --json controls.json --html controls.html

The steps are groups with policies of their own in the same gateway, so nothing but the policy differs; they take turns,
and each number is the median over the rounds. Key, Cedar decision, limits and two durable records can't be turned off:
they are the first step after the bare proxy. The engine answers at once with 64 tokens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import uvloop

from benchmarks.gateway.kit import MODEL, ROOT, standing_kit
from benchmarks.gateway.load import closed_loop, http_request
from benchmarks.gateway.overhead import body, fdatasync_ms, pin, start_bare
from benchmarks.report import waterfalls, write_html
from benchmarks.result import Measure, Result, finish, write_result
from server.engine.local import engine_paths

STEPS = {
    "key, policy, limits, durable audit": ("control", "off", "off"),
    "the security template": ("secure-coding", "off", "off"),
    "scan of the prompt": ("secure-coding", "annotate", "off"),
    "scan of the answer": ("secure-coding", "annotate", "annotate"),
}
POLICY = """
@id("bench-{number}")
@description("a step of the benchmark of controls")
@template("{template}")
@scan_input("{before}")
@scan_output("{after}")
@max_tokens("4096")
permit (principal in Group::"bench-{number}", action == Action::"model:chat:create", resource);

@id("bench-{number}-look")
@description("a step of the benchmark of controls")
permit (principal in Group::"bench-{number}", action == Action::"model:model:list", resource);
"""


def write_policies(folder: Path) -> Path:
    """The default policies, and one group more for each step; return the folder."""
    shutil.copytree(ROOT / "configs" / "policy", folder)
    texts = [
        POLICY.format(number=number, template=template, before=before, after=after)
        for number, (template, before, after) in enumerate(STEPS.values())
    ]
    (folder / "99-benchmark.cedar").write_text("".join(texts), encoding="utf-8")
    return folder


async def measure(kit, keys: list[str], bare_port: int, rounds: int, seconds: float, *, stream: bool) -> dict:
    gateway = ("127.0.0.1", kit.settings.public.port)
    engine = str(engine_paths(kit.settings.state, MODEL).socket)
    direct = http_request("/v1/chat/completions", body(stream=stream))
    ways = {"engine alone": (engine, direct), "a proxy without controls": (("127.0.0.1", bare_port), direct)}
    for name, key in zip(STEPS, keys, strict=True):
        ways[name] = (gateway, http_request("/v1/chat/completions", body(stream=stream), key=key))
    seen: dict[str, list[float]] = {name: [] for name in ways}
    kit.control(num_tokens=64)
    for number in range(rounds + 1):
        for name, (address, request) in ways.items():
            load = await closed_loop(address, request, connections=1, seconds=seconds)
            if load.num_errors:
                raise SystemExit(f"{name}: {load.num_errors} requests failed")
            if number:  # the first round warms up
                seen[name].append(load.percentile_ms(50))
    return seen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="strongroom bench controls", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each step in a round")
    parser.add_argument("--state", type=Path, help="where the state folder is made; its disk is part of the figures")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--html", type=Path, help="write a report here")
    parser.add_argument("--svg", type=Path, help="write a picture of the streamed request here")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.seconds <= 0:
        parser.error("--rounds must be at least 1, --seconds above 0")
    with (
        tempfile.TemporaryDirectory(prefix="sr-policy-") as folder,
        standing_kit(args.state, policy={"directory": str(write_policies(Path(folder) / "policy"))}) as kit,
    ):
        keys = [kit.working_key(groups={f"bench-{number}"}) for number in range(len(STEPS))]
        layout = pin(kit)
        bare, bare_port = start_bare(kit, layout["gateway"][0])
        try:
            sync_ms = fdatasync_ms(kit.state)
            found = {
                kind: uvloop.run(measure(kit, keys, bare_port, args.rounds, args.seconds, stream=kind == "streamed"))
                for kind in ("plain", "streamed")
            }
        finally:
            bare.kill()
            bare.wait()
    rows, measures, falls = [], [], []
    for kind, seen in found.items():
        before, steps = 0.0, []
        for name, values in seen.items():
            median = statistics.median(values)
            steps.append({"name": name, "value": round(median - before, 4)})
            rows.append(
                {"answer": kind, "step": name, "p50_ms": round(median, 4), "added_ms": round(median - before, 4)}
            )
            measures.append(Measure("p50", "ms", "lower", "p50", median, None, {"answer": kind, "step": name}, values))
            before = median
            print("  ".join(f"{field}={value}" for field, value in rows[-1].items()), flush=True)
        falls.append({"title": f"One request, 64 tokens, {kind}: where its time goes", "unit": "ms", "steps": steps})
    settings = {
        "rounds": args.rounds,
        "seconds": args.seconds,
        "fdatasync_ms": round(sync_ms, 4),
        "cpus": os.cpu_count(),
    }
    result = finish(Result("controls", settings, measures, rows, {"waterfalls": falls}))
    if args.json:
        write_result(result, args.json)
    if args.html:
        write_html([result], args.html)
    if args.svg:
        args.svg.write_text(list(waterfalls(result))[-1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
