"""`strongroom usage`: who spent how much, as a chart, a table for spreadsheets, or JSON."""

from __future__ import annotations

import csv
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from server.settings import find_store_url
from server.store.database import Store
from server.store.usage_report import COUNTED, GROUPINGS, parse_day_s, report_usage

if TYPE_CHECKING:
    import argparse

HELP = "Show what was used, by tenant, team, subject, key, model or day."
EPILOG = """examples:
  strongroom usage --by team
  strongroom usage --by day --from 2026-11-01 --to 2026-12-01 --csv > november.csv"""
DAY_S = 86400.0
BAR_CHARS = 40


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--state", type=Path, default=Path(".strongroom"), help="state folder (default .strongroom)")
    parser.add_argument("--store", help="address of the store (default: the one that the server of STATE uses)")
    parser.add_argument("--by", choices=GROUPINGS, default="tenant", help="what to sum by (default tenant)")
    parser.add_argument("--tenant", help="only this tenant's")
    parser.add_argument("--from", dest="from_day", help="first day, UTC (default: 30 days ago)")
    parser.add_argument("--to", dest="to_day", help="the day after the last, UTC (default: up to now)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print CSV")
    form.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the usage."""
    store = Store.open(find_store_url(args.state, args.store))
    try:
        rows = report_usage(
            store,
            from_s=parse_day_s(args.from_day, "from") if args.from_day else time.time() - 30 * DAY_S,
            to_s=parse_day_s(args.to_day, "to") if args.to_day else time.time(),
            by=args.by,
            tenant=args.tenant,
        )
    finally:
        store.close()
    if args.json:
        print(json.dumps(rows))
    elif args.csv:
        columns = list(dict.fromkeys(["tenant", args.by, *COUNTED]))
        writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows([{name: _defused(value) for name, value in row.items()} for row in rows])
    else:
        _chart(rows, args.by)
    return 0


def _chart(rows: list[dict[str, Any]], by: str) -> None:
    if not rows:
        print("Nothing was used in this time.")
        return
    names = [row["tenant"] if by == "tenant" else f"{row['tenant']}/{row[by]}" for row in rows]
    tokens = [row["prompt_tokens"] + row["completion_tokens"] for row in rows]
    widest, most = max(map(len, names)), max(*tokens, 1)
    for name, num, row in zip(names, tokens, rows, strict=True):
        bar = "█" * round(BAR_CHARS * num / most)
        cost = f"{row['cost_micros'] / 1e6:.2f}"
        print(f"{name.ljust(widest)}  {num:>12,} tokens {row['requests']:>8,} requests {cost:>10}  {bar}".rstrip())


def _defused(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t" else value
