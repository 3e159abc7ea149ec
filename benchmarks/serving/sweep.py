"""Rates times settings: the same requests at each rate against each server, with what was done already left as it is.

    strongroom bench sweep --plan plan.yaml --json sweep.json --html sweep.html --workload edit --duration 30

The plan:

    rates: [0.5, 1, 2, 4]
    settings:
      - {name: elsewhere, url: "http://gpu-box:8000/v1", model: coder}     # a server that runs
      - {name: guess 4, engine: {speculative_ngram: 4}}                    # started here, engine settings replaced
      - {name: w8a8, path: models/coder-w8a8}                              # started here, another sealed folder

Servers that are started here serve `--config` with the state folder `--state`. The result is written after each cell; a
run that was cut off goes on where it stopped, as long as plan and arguments are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvloop
import yaml

from benchmarks.report import write_html
from benchmarks.result import Measure, Result, ResultError, finish, load_result, write_result
from benchmarks.serving.client import Target
from benchmarks.serving.metrics import Limits, measures, row
from benchmarks.serving.serve import Plan, add_arguments, judge, plan_of, run_rate, settings_of, show
from benchmarks.serving.served import DEFAULT_CONFIG, NotServedError, Served

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_CELLS = 500


@dataclass(frozen=True)
class Setting:
    """One server of the grid."""

    name: str
    url: str | None = None
    model: str | None = None
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    path: str | None = None


def parse_plan(raw: Any) -> tuple[list[float], list[Setting]]:
    """Rates and settings of a plan.

    Raises:
        ValueError: It has another form.
    """
    if not isinstance(raw, dict) or set(raw) != {"rates", "settings"}:
        raise ValueError("a plan has rates and settings, and nothing else")
    rates, given = raw["rates"], raw["settings"]
    if not isinstance(rates, list) or not rates or not all(_is_rate(rate) for rate in rates):
        raise ValueError("rates must be a list of numbers above 0")
    if not isinstance(given, list) or not given or not all(isinstance(each, dict) for each in given):
        raise ValueError("settings must be a list of objects, each with a name")
    known = {field.name for field in dataclasses.fields(Setting)}
    settings = []
    for each in given:
        if not isinstance(each.get("name"), str) or set(each) - known or not isinstance(each.get("engine", {}), dict):
            raise ValueError(f"a setting has a name, and some of {', '.join(sorted(known - {'name'}))}: {each}")
        if each.get("url") and (each.get("engine") or each.get("path")):
            raise ValueError(f"setting '{each['name']}': a server that runs takes no engine settings and no path")
        settings.append(Setting(**each))
    if len({setting.name for setting in settings}) != len(settings) or len(set(rates)) != len(rates):
        raise ValueError("names and rates must each be there once")
    if len(rates) * len(settings) > MAX_CELLS:
        raise ValueError(f"more than {MAX_CELLS} cells")
    return [float(rate) for rate in rates], settings


def _is_rate(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


@contextlib.contextmanager
def target_of(setting: Setting, plan: Plan, args: argparse.Namespace) -> Iterator[Plan]:
    """The plan for one setting, its server running."""
    if setting.url is not None:
        target = Target.parse(setting.url, key=os.environ.get(args.key_env, ""), ca=args.ca)
        options = dataclasses.replace(plan.options, model=setting.model or plan.options.model)
        yield dataclasses.replace(plan, target=target, options=options)
        return
    if not setting.engine and setting.path is None:
        yield plan
        return
    with Served(args.state, args.config, setting.engine, setting.path) as served:
        client = served.client
        target = Target.parse(client["OPENAI_BASE_URL"], key=client["OPENAI_API_KEY"])
        yield dataclasses.replace(plan, target=target, options=dataclasses.replace(plan.options, model=client["MODEL"]))


def earlier(path: Path | None, settings: dict[str, Any]) -> Result | None:
    """What an earlier run of the same sweep left.

    Raises:
        ResultError: The file is something else; it is not written over.
    """
    if path is None or not path.exists():
        return None
    found = load_result(path)
    if found.benchmark != "sweep" or found.settings != json.loads(json.dumps(settings)):
        raise ResultError(f"{path}: of another benchmark, plan or settings; name a new file.")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="strongroom bench sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--plan", type=Path, required=True, help="rates and settings, YAML")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="what servers started here serve")
    parser.add_argument("--state", type=Path, default=Path(".strongroom-bench"), help="their state folder")
    args = parser.parse_args(argv)
    try:
        rates, grid = parse_plan(yaml.safe_load(args.plan.read_text(encoding="utf-8")))
        if all(setting.url or setting.engine or setting.path for setting in grid):
            # Neither address nor model is needed; each setting brings its own.
            args.url, args.model = args.url or "http://127.0.0.1/v1", args.model or "none"
        plan, limits = plan_of(args), Limits.parse(args.goodput)
        settings = {**settings_of(plan, args), "plan": [dataclasses.asdict(each) for each in grid], "rates": rates}
        before = earlier(args.json, settings)
    except (ValueError, OSError, yaml.YAMLError) as err:
        parser.error(str(err))
    found: list[Measure] = list(before.measures) if before else []
    rows: list[dict[str, Any]] = [dict(each) for each in before.rows] if before else []
    done = {(each["settings"], each["rate"]) for each in rows}
    code = 0
    for setting in grid:
        missing = [rate for rate in rates if (setting.name, f"{rate:g}") not in done]
        if not missing:
            print(f"{setting.name}: done before", flush=True)
            continue
        try:
            with target_of(setting, plan, args) as here:
                for rate in missing:
                    run = uvloop.run(run_rate(here, args.arrivals, rate))
                    labels = {"settings": setting.name, "rate": f"{rate:g}"}
                    found += measures(run, limits, labels)
                    rows.append({**labels, **row(run, limits)})
                    show(rows[-1])
                    code = max(code, judge([run], args.max_errors))
                    if args.json:
                        write_result(finish(Result("sweep", settings, found, rows)), args.json)
        except NotServedError as err:
            print(f"{setting.name}: {err}", file=sys.stderr)
            code = 3
    if args.html:
        write_html([finish(Result("sweep", settings, found, rows))], args.html)
    return code


if __name__ == "__main__":
    sys.exit(main())
