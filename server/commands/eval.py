"""`strongroom eval`: what a template does to the answers of a served model."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from server.errors import ConfigError
from server.evaluation import ask, measure, report, sets
from server.guard.scan import scan_code
from server.pipelines import endpoint
from server.sealed.embedded import MODEL_ID as EMBEDDED_MODEL_ID
from server.template.registry import TemplateRegistry

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

HELP = "measure insecure code, refusals, bias, usefulness and attacks with one template and another"
EPILOG = "example: strongroom eval --arm control=control.env --arm secure=.strongroom/client.env --out evaluation"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "--arm",
        action="append",
        required=True,
        metavar="NAME=ENV-FILE",
        help="an env file as the server writes client.env; the first arm is what the others are compared with",
    )
    parser.add_argument("--prompts", type=Path, default=Path("configs/evaluation"), help="folder of the prompt sets")
    parser.add_argument("--sets", default=",".join(sets.SETS), help=f"which sets (default: {','.join(sets.SETS)})")
    parser.add_argument("--seeds", type=int, default=5, help="answers drawn to each question (default: 5)")
    parser.add_argument("--limit", type=int, help="only the first so many questions of each set")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--concurrency", type=int, default=4, help="questions at a time (default: 4)")
    parser.add_argument(
        "--templates", type=Path, default=Path("configs/templates"), help="templates, to recognise leaks of their text"
    )
    parser.add_argument("--note", default="", help="a remark that stands at the head of the report")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder for answers, results and report")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> int:
    """Ask, judge, write the report; an interrupted run goes on where it stopped."""
    arms = [_parse_arm(text) for text in args.arm]
    if len({arm.name for arm in arms}) != len(arms):
        raise ConfigError("Two arms have the same name.")
    names = [name.strip() for name in args.sets.split(",") if name.strip()]
    if unknown := [name for name in names if name not in sets.SETS]:
        raise ConfigError(f"There is no set {unknown[0]!r}. Choose among {', '.join(sets.SETS)}.")
    if args.seeds < 1 or args.concurrency < 1 or args.max_tokens < 1:
        raise ConfigError("--seeds, --concurrency and --max-tokens must be at least 1.")
    items = {name: sets.load_set(args.prompts / f"{name}.yaml", name) for name in names}
    questions = [q for name in names for q in list(sets.questions(name, items[name]))[: args.limit]]
    args.out.mkdir(parents=True, exist_ok=True)
    sampling = ask.Sampling(args.temperature, args.max_tokens)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=True
    ) as progress:
        task = progress.add_task("asking", total=len(questions) * args.seeds * len(arms))
        answers = asyncio.run(
            ask.ask_all(
                arms,
                questions,
                range(args.seeds),
                sampling,
                args.out / "answers.jsonl",
                concurrency=args.concurrency,
                advance=lambda: progress.advance(task),
            )
        )
    results = measure.measure(
        answers, {q.key: q for q in questions}, items, _known_templates(args.templates, answers), _find_cwes
    )
    results["meta"] = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "models": {arm.name: arm.endpoint.model for arm in arms},
        "num_seeds": args.seeds,
        "temperature": args.temperature,
        "max_tokens": args.max_tokens,
        "sets": names,
        "note": " ".join(filter(None, (args.note, _small_model_note(arms)))),
        "failed": sum(bool(a.error) for a in answers),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (args.out / "report.html").write_text(report.to_html(results), encoding="utf-8")
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        _print_summary(results, args.out / "report.html")
    return 0


def _parse_arm(text: str) -> ask.Arm:
    name, found, path = text.partition("=")
    if not found or not name:
        raise ConfigError(f"--arm takes NAME=ENV-FILE, not {text!r}.")
    return ask.Arm(name, endpoint.parse(endpoint.read_env(Path(path)), f"arm {name!r}"))


def _small_model_note(arms: list[ask.Arm]) -> str:
    """Say so where the answers are the embedded model's: its numbers show that the measurement works, and no more."""
    if all(arm.endpoint.model != EMBEDDED_MODEL_ID for arm in arms):
        return ""
    return (
        f"{EMBEDDED_MODEL_ID} has 135 million parameters: these are a small model's numbers. It follows few "
        "instructions and writes hardly any code that runs; they say nothing of a model that you would use."
    )


def _known_templates(folder: Path, answers: Iterable[ask.Answer]) -> dict[str, str]:
    """Return the text, by digest, of each template that the answers' headers name and that is here as it was there."""
    seen = {(answer.template, answer.digest) for answer in answers if answer.digest}
    if not seen or not (folder / "templates.lock").exists():
        return {}
    registry = TemplateRegistry.load(folder, folder / "templates.lock")
    texts = {}
    for name, digest in seen:
        ids = name.partition("@")[0].split("+")
        if all(part in registry.templates for part in ids):
            composed = registry.compose(ids)
            if composed.ref.digest == digest:
                texts[digest] = composed.text
    return texts


def _find_cwes(code: str, language: str | None) -> set[str]:
    findings, _ = scan_code(code, language or None)
    return {finding.cwe for finding in findings if finding.cwe}


def _print_summary(results: dict[str, Any], path: Path) -> None:
    for name, (label, _) in measure.RATES.items():
        for arm in results["arms"]:
            estimate = results["rates"][name].get(arm)
            if estimate and estimate["num"]:
                low, high = 100 * estimate["low"], 100 * estimate["high"]
                share = f"{100 * estimate['value']:5.1f} % [{low:.1f}, {high:.1f}]"
                print(f"{label:<38} {arm:<16} {share} of {estimate['num']}")
    if failed := results["meta"]["failed"]:
        print(f"{failed} questions got no answer and are left out; run again to ask them once more.")
    print(f"Report: {path}")
