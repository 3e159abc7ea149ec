"""`strongroom batch`: a file of requests, or of texts to extract fields from, through a served model."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.errors import ConfigError
from server.pipelines import batch, endpoint

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import TextIO

    from server.pipelines.batch import Counts, Job
    from server.pipelines.endpoint import Reply

HELP = "run a file of requests, or extract fields from a file of texts"
EPILOG = (
    "example: strongroom batch requests.jsonl answers.jsonl\n"
    "example: strongroom batch texts.jsonl records.jsonl --schema ticket.schema.json\n"
    "Run it again after a stop: what is answered is not asked again. Exit code 0: every line is answered and valid; "
    "1: not all."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("input", type=Path, metavar="IN.jsonl", help="OpenAI batch lines; with --schema, texts")
    parser.add_argument(
        "output", type=Path, metavar="OUT.jsonl", help="answers, as they come; an old file is gone on with"
    )
    parser.add_argument(
        "--schema",
        type=Path,
        metavar="FILE",
        help='JSON Schema of the fields of one record; lines are then {"custom_id": …, "text": …}, and what does not '
        "fit goes to OUT.invalid.jsonl with the reason",
    )
    parser.add_argument("--concurrency", type=int, default=4, help="requests at a time (default: 4)")
    parser.add_argument("--max-tokens", type=int, default=1024, help="for one record, with --schema (default: 1024)")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    endpoint.configure(parser)


def run(args: argparse.Namespace) -> int:
    """Send what is not answered yet; 0 only when every line has a valid answer."""
    where = endpoint.from_args(args)
    values = batch.read_lines(args.input)
    schema = None if args.schema is None else _load_schema(args.schema)
    if args.output.resolve() == args.input.resolve():
        raise ConfigError("The answers can't go into the file of the requests; name another.")
    counts = batch.Counts()
    with ExitStack() as stack:
        on_reply: Callable[[Job, Reply], None]
        if schema is None:
            jobs = batch.parse_jobs(values)
            done = batch.load_done(args.output, is_final=_is_answered)
            file = stack.enter_context(args.output.open("a", encoding="utf-8"))
            on_reply = _keep_answers(file, counts)
        else:
            jobs = batch.extraction_jobs(values, schema, model=where.model, max_tokens=args.max_tokens)
            apart = args.output.with_name(args.output.stem + ".invalid.jsonl")
            done = batch.load_done(args.output, is_final=lambda line: "fields" in line)
            known_invalid = batch.load_done(apart, is_final=lambda line: line["custom_id"] not in done)
            counts.invalid = sum(job.custom_id in known_invalid for job in jobs)
            jobs = [job for job in jobs if job.custom_id not in known_invalid]
            file = stack.enter_context(args.output.open("a", encoding="utf-8"))
            invalid = stack.enter_context(apart.open("a", encoding="utf-8"))
            on_reply = _keep_records(file, invalid, schema, counts)
        counts.kept = sum(job.custom_id in done for job in jobs)
        left = [job for job in jobs if job.custom_id not in done]
        asyncio.run(_send(where, left, on_reply, args.concurrency))
    _report(args, counts)
    return 0 if not counts.failed and not counts.invalid else 1


async def _send(
    where: endpoint.Endpoint, jobs: list[Job], on_reply: Callable[[Job, Reply], None], concurrency: int
) -> None:
    with _progress(len(jobs)) as advance:

        def heard(job: Job, reply: Reply) -> None:
            on_reply(job, reply)
            if advance is not None:
                advance()

        async with endpoint.Caller(where, concurrency=max(1, concurrency)) as caller:
            await batch.run_all(caller, jobs, heard)


def _keep_answers(file: TextIO, counts: Counts) -> Callable[[Job, Reply], None]:
    def keep(job: Job, reply: Reply) -> None:
        batch.write_line(file, batch.to_line(job, reply))
        if reply.error:
            counts.failed += 1
        else:
            counts.done += 1

    return keep


def _keep_records(
    file: TextIO, invalid: TextIO, schema: dict[str, Any], counts: Counts
) -> Callable[[Job, Reply], None]:
    def keep(job: Job, reply: Reply) -> None:
        if reply.error and not batch.is_refused(reply.status):
            counts.failed += 1  # asked again by the next run
            return
        record, reason = batch.find_record(reply, schema)
        if record is None:
            counts.invalid += 1
            batch.write_line(invalid, batch.to_invalid_line(job, reply, reason))
        else:
            counts.done += 1
            batch.write_line(file, {"custom_id": job.custom_id, "fields": record})

    return keep


def _is_answered(line: dict[str, Any]) -> bool:
    """Whether a line need not be asked again: it was answered, or refused for what it says."""
    response = line.get("response")
    status = response.get("status_code") if isinstance(response, dict) else None
    return isinstance(status, int) and (status == 200 or batch.is_refused(status))


def _load_schema(path: Path) -> dict[str, Any]:
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise ConfigError(f"The schema {path} can't be read as JSON.") from err
    if not isinstance(schema, dict):
        raise ConfigError(f"The schema {path} must be a JSON object.")
    return schema


def _report(args: argparse.Namespace, counts: Counts) -> None:
    if args.json:
        print(json.dumps({n: getattr(counts, n) for n in ("done", "kept", "invalid", "failed")}))
        return
    told = f"{counts.done} answered, {counts.kept} from an earlier run, {counts.failed} failed"
    print(told + (f", {counts.invalid} invalid" if args.schema else ""), file=sys.stderr)
    if counts.failed:
        print("Run the same command again to send the failed ones once more.", file=sys.stderr)


def _progress(total: int) -> Any:
    if not sys.stderr.isatty() or not total:
        return nullcontext(None)
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def shown() -> Any:
        columns = (TextColumn("asking"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("asking", total=total)
            yield lambda: progress.advance(task)

    return shown()
