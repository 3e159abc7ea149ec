"""`strongroom policy`: policies are checked, tested and asked why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from server.policy.cases import evaluate, load_cases, parse_question, run_cases
from server.policy.cedar import PolicySet, Question
from server.policy.limit_file import load_limits
from server.policy.review import find_idle

if TYPE_CHECKING:
    import argparse

    from server.policy.cedar import Rule
    from server.types import Obligations

HELP = "Check, test and explain the policies."
EPILOG = """examples:
  strongroom policy check
  strongroom policy test --dir configs/policy
  strongroom policy why --group developers --action model:chat:create --model house-coder --stage live

'check' and 'test' end with 1 when something is amiss, for a build to stop."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every act."""
    acts = parser.add_subparsers(dest="act", required=True, metavar="ACT")

    def act(name: str, told: str) -> argparse.ArgumentParser:
        added = acts.add_parser(name, help=told, description=told)
        added.add_argument("--dir", type=Path, default=Path("configs/policy"), help="folder (default configs/policy)")
        added.add_argument("--json", action="store_true", help="print JSON")
        return added

    act("check", "Validate, list what each policy does, and find permits and forbids that are of no use.")
    tested = act("test", "Run the table of cases.")
    tested.add_argument("--cases", type=Path, help="the file of cases (default: cases.yaml in the folder)")
    why = act("why", "Answer one question and say which policies decided, and what they demand.")
    why.add_argument("--question", type=Path, help="a JSON file of the question; flags win over it")
    for name in Question._fields:
        flag = (
            "--" + name.rstrip("s").replace("_", "-") if name in ("groups", "scopes") else "--" + name.replace("_", "-")
        )
        if name in ("groups", "scopes"):
            why.add_argument(flag, dest=name, action="append", help=f"one of the {name}")
        elif name == "stream":
            why.add_argument(flag, dest=name, action="store_true", default=None)
        else:
            why.add_argument(flag, dest=name, type=int if name in ("num_tokens", "hour", "weekday") else str)


def run(args: argparse.Namespace) -> int:
    """Do one act."""
    policies = PolicySet.load(args.dir)
    if args.act == "check":
        return _check(args, policies)
    if args.act == "test":
        return _test(args, policies)
    return _why(args, policies)


def _check(args: argparse.Namespace, policies: PolicySet) -> int:
    if (args.dir / "limits.yaml").exists():
        load_limits(args.dir / "limits.yaml")
    with Console(stderr=True).status("looking for policies that are of no use"):
        idle = find_idle(policies)
    if args.json:
        rules = [_describe(rule) for rule in policies.rules.values()]
        problems = [{"policy": one.rule_id, "problem": one.problem} for one in idle]
        print(json.dumps({"digest": policies.digest, "policies": rules, "problems": problems}))
        return 1 if idle else 0
    for rule in policies.rules.values():
        told = _describe(rule)
        print(f"{rule.effect} {rule.id}: {rule.description}")
        print(f"    on {'everything' if len(rule.actions) > 20 else ' '.join(told['actions'])}")
        for name, value in told["demands"].items():
            print(f"    demands {name} = {value}")
    for one in idle:
        print(f"{one.rule_id}: {one.problem}")
    print(f"{len(policies.rules)} policies, digest {policies.digest[:16]}, {len(idle)} of no use")
    return 1 if idle else 0


def _test(args: argparse.Namespace, policies: PolicySet) -> int:
    cases = load_cases(args.cases or args.dir / "cases.yaml")
    failures = run_cases(policies, cases)
    if args.json:
        told = [{"case": one.name, "problem": one.problem} for one in failures]
        print(json.dumps({"digest": policies.digest, "cases": len(cases), "failures": told}))
    else:
        for one in failures:
            print(f"{one.name}: {one.problem}")
        print(f"{len(cases) - len(failures)} of {len(cases)} cases hold")
    return 1 if failures else 0


def _why(args: argparse.Namespace, policies: PolicySet) -> int:
    given: dict[str, Any] = {}
    if args.question is not None:
        given = json.loads(args.question.read_text(encoding="utf-8"))
    given |= {name: getattr(args, name) for name in Question._fields if getattr(args, name) is not None}
    question = parse_question(
        {"stage": "live", "classification": "confidential", "num_tokens": 512} | given, "question"
    )
    decision = evaluate(policies, question)
    deciding = [
        {"policy": rule_id, "file": policies.rules[rule_id].file, "description": policies.rules[rule_id].description}
        for rule_id in decision.policies
    ]
    demands = _demands(decision.obligations) if decision.allowed else {}
    answer = {
        "allowed": decision.allowed,
        "reason": decision.reason,
        "policies": deciding,
        "demands": demands,
        "digest": decision.policy_digest,
    }
    if args.json:
        print(json.dumps(answer))
        return 0
    print(f"{'allowed' if decision.allowed else 'refused'}: {decision.reason}")
    for one in deciding:
        print(f"  {one['policy']} ({one['file']}): {one['description']}")
    for name, value in demands.items():
        print(f"  demands {name} = {value}")
    return 0


def _describe(rule: Rule) -> dict[str, Any]:
    return {
        "policy": rule.id,
        "effect": rule.effect,
        "file": rule.file,
        "description": rule.description,
        "actions": sorted(rule.actions),
        "demands": _demands(rule.obligations) if rule.effect == "permit" and rule.obligations.templates else {},
    }


def _demands(obligations: Obligations) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(obligations).items() if value not in (None, "", ())}
