"""`strongroom review`: a served model reviews a diff under the review template; for CI."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from server.commands.scan import print_reports
from server.errors import ConfigError
from server.guard.scan import SEVERITIES
from server.pipelines import endpoint, review
from server.types import ScanReport, ScanState

if TYPE_CHECKING:
    import argparse

    from server.pipelines.endpoint import Caller
    from server.pipelines.review import Chunk

HELP = "have a served model review a diff"
EPILOG = (
    "example: git diff origin/main | strongroom review --diff - --format sarif > review.sarif\n"
    "Exit code 0: all was reviewed and nothing was found; 1: findings, or a part that was not reviewed; 2: usage."
)
NUM_ASKED = 2


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--diff", required=True, metavar="FILE", help="a unified diff; - reads standard input")
    parser.add_argument(
        "--format", choices=("text", "json", "sarif"), default="text", help="what to print (default: text)"
    )
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="the same as --format json")
    parser.add_argument("--severity", choices=SEVERITIES, default="low", help="leave out what is below (default: low)")
    parser.add_argument("--max-tokens", type=int, default=1500, help="for one answer (default: 1500)")
    parser.add_argument(
        "--max-chars", type=int, default=review.MAX_CHUNK_CHARS, help="of the diff in one request (default: 12000)"
    )
    parser.add_argument("--concurrency", type=int, default=2, help="requests at a time (default: 2)")
    endpoint.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Review and print; 0 only when everything was reviewed and nothing was found."""
    where = endpoint.from_args(args)
    chunks = review.parse_diff(_read(args.diff), max_chars=max(500, args.max_chars))
    reports, templates = asyncio.run(_review(args, where, chunks))
    for template in sorted(templates):
        print(f"reviewed under the template {template}", file=sys.stderr)
    if templates and not any("review" in template.partition("@")[0].split("+") for template in templates):
        print(
            "The server's policy did not put the template 'review' before the diff; use a key of a group that gets it "
            "(in the policies that ship: reviewers).",
            file=sys.stderr,
        )
    return print_reports(review.merge(reports), severity=args.severity, form=args.format)


async def _review(
    args: argparse.Namespace, where: endpoint.Endpoint, chunks: list[Chunk]
) -> tuple[list[tuple[Chunk, ScanReport]], set[str]]:
    templates: set[str] = set()
    done = 0

    async def one(caller: Caller, chunk: Chunk) -> tuple[Chunk, ScanReport]:
        nonlocal done
        body = review.ask_for(chunk, model=where.model, max_tokens=args.max_tokens)
        report = ScanReport(ScanState.UNSCANNED, reason="not asked")
        for _ in range(NUM_ASKED):  # an answer out of form is asked for once more, then told as not reviewed
            reply = await caller.post("/chat/completions", body)
            if reply.error:
                report = ScanReport(ScanState.UNSCANNED, reason=f"the server did not answer: {reply.error}")
                break
            templates.add(reply.headers.get("x-strongroom-template", "(none named)"))
            report = review.parse_answer(chunk, reply.body)
            if report.state is not ScanState.UNSCANNED:
                break
            body = {**body, "temperature": 0.4, "seed": 1}
        done += 1
        if sys.stderr.isatty():
            print(f"\rreviewed {done} of {len(chunks)} parts", end="" if done < len(chunks) else "\n", file=sys.stderr)
        return chunk, report

    async with endpoint.Caller(where, concurrency=max(1, args.concurrency)) as caller:
        return list(await asyncio.gather(*(one(caller, chunk) for chunk in chunks))), templates


def _read(name: str) -> str:
    if name == "-":
        return sys.stdin.read()
    try:
        return Path(name).read_text(encoding="utf-8", errors="replace")
    except OSError as err:
        raise ConfigError(f"The diff {name} can't be read: {err.strerror}.") from err
