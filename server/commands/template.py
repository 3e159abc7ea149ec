"""`strongroom template`: the security templates, their lock and their roll-out."""

from __future__ import annotations

import base64
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from server.errors import ConfigError, RequestError
from server.template import lock as locking
from server.template import source
from server.template.registry import TemplateRegistry
from server.template.rollout import Rollout, Stage, bucket

if TYPE_CHECKING:
    import argparse

HELP = "list, show, render, test, lock and roll out security templates"
EPILOG = "example: strongroom template render secure-coding python --set organisation='Example Ltd'"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--directory", type=Path, default=Path("configs/templates"), help="where the templates are")
    parser.add_argument("--lock", type=Path, help="the lock file (default: templates.lock in the directory)")
    parser.add_argument("--rollout-file", type=Path, help="the roll-out file (default: rollout.json in the directory)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    verbs = parser.add_subparsers(dest="action", required=True)
    verbs.add_parser("list", help="every template with its versions")
    show = verbs.add_parser("show", help="one template as its file has it")
    show.add_argument("id")
    show.add_argument("--version")
    render = verbs.add_parser("render", help="templates composed, as they would stand in a prompt")
    render.add_argument("ids", nargs="+")
    render.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a variable; may be repeated")
    render.add_argument("--subject", default="", help="compose what this subject gets in a roll-out")
    verbs.add_parser("test", help="run the templates' own test cases and hold them to the lock")
    lock = verbs.add_parser("lock", help="write the lock: the act by which a reviewed template becomes loadable")
    lock.add_argument(
        "--sign-key", type=Path, help="PEM file of an Ed25519 private key; writes the signature beside the lock"
    )
    lock.add_argument("--check", action="store_true", help="write nothing; fail where the lock is not in step")
    rollout = verbs.add_parser("rollout", help="show or change which version subjects get")
    rollout.add_argument("id", nargs="?")
    rollout.add_argument("--to", help="the candidate version")
    rollout.add_argument("--percent", type=float, help="percentage of subjects that get the candidate")
    rollout.add_argument("--shadow", action="store_true", help="compose and record the candidate only; nobody gets it")
    rollout.add_argument("--promote", action="store_true", help="the candidate becomes what everybody gets")
    rollout.add_argument("--back", action="store_true", help="roll back: everybody gets the stable version again")
    rollout.add_argument("--stable", help="pin the stable version")
    rollout.add_argument("--subject", help="say which version this subject gets")


def run(args: argparse.Namespace) -> int:
    """Run the verb."""
    lock_path = args.lock or args.directory / "templates.lock"
    rollout_path = args.rollout_file or args.directory / "rollout.json"
    action = {"list": _list, "show": _show, "render": _render, "test": _test, "lock": _lock, "rollout": _rollout}
    return action[args.action](args, lock_path, rollout_path)


def _list(args: argparse.Namespace, lock_path: Path, rollout_path: Path) -> int:
    loaded = TemplateRegistry.load(args.directory, lock_path, rollout_path=rollout_path)
    rows = [
        {
            "id": t.id,
            "version": t.version,
            "scope": t.scope,
            "owner": t.owner,
            "title": t.title,
            "standards": list(t.standards),
            "formats": sorted(t.formats),
            "digest": t.digest,
        }
        for versions in loaded.templates.values()
        for t in versions.values()
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        for row in rows:
            print(f"{row['id']:<24} {row['version']:<8} {row['scope']:<13} {row['owner']:<18} {row['title']}")
    return 0


def _show(args: argparse.Namespace, lock_path: Path, rollout_path: Path) -> int:
    loaded = TemplateRegistry.load(args.directory, lock_path, rollout_path=rollout_path)
    template = _find(loaded, args.id, args.version)
    if args.json:
        data = {**dataclasses.asdict(template), "formats": sorted(template.formats)}
        print(json.dumps(data, indent=2))
    else:
        print((args.directory / template.id / f"{template.version}.md").read_text())
    return 0


def _render(args: argparse.Namespace, lock_path: Path, rollout_path: Path) -> int:
    loaded = TemplateRegistry.load(args.directory, lock_path, rollout_path=rollout_path)
    composed = loaded.compose(args.ids, _parse_variables(args.set), subject=args.subject)
    if args.json:
        ref = dataclasses.asdict(composed.ref)
        print(json.dumps({"text": composed.text, "preamble": composed.preamble, "template": ref}, indent=2))
    else:
        print(composed.text)
        print(f"{composed.ref.id} {composed.ref.version} sha256:{composed.ref.digest}", file=sys.stderr)
    return 0


def _test(args: argparse.Namespace, lock_path: Path, rollout_path: Path) -> int:
    loaded = TemplateRegistry.load(args.directory, lock_path, rollout_path=rollout_path)
    templates = [t for versions in loaded.templates.values() for t in versions.values()]
    num_cases = sum(len(t.cases) for t in templates)
    if args.json:
        print(json.dumps({"templates": len(templates), "cases": num_cases, "failed": 0}))
    else:
        print(f"{len(templates)} templates are in step with their lock; {num_cases} cases hold.")
    return 0


def _lock(args: argparse.Namespace, lock_path: Path, rollout_path: Path) -> int:
    templates = source.load_directory(args.directory)
    for versions in templates.values():
        for template in versions.values():
            source.verify_cases(template)
    Rollout.load(rollout_path).verify(templates)
    content = locking.encode_lock(locking.digests(templates))
    if args.check:
        locking.verify_lock(templates, locking.load_lock(lock_path))
        return 0
    lock_path.write_bytes(content)
    signature_path = lock_path.with_name(lock_path.name + locking.SIGNATURE_SUFFIX)
    if args.sign_key is not None:
        signature_path.write_bytes(base64.b64encode(_load_key(args.sign_key).sign(content)) + b"\n")
    else:
        # A signature of the former lock would only look like one of this lock.
        signature_path.unlink(missing_ok=True)
    num_versions = sum(map(len, templates.values()))
    print(
        json.dumps({"locked": num_versions})
        if args.json
        else f"{num_versions} template versions locked in {lock_path}."
    )
    return 0


def _rollout(args: argparse.Namespace, lock_path: Path, rollout_path: Path) -> int:
    loaded = TemplateRegistry.load(args.directory, lock_path, rollout_path=rollout_path)
    rollout = loaded.rollout
    if args.id is None:
        print(rollout.encode().decode(), end="")
        return 0
    versions = loaded.templates.get(args.id)
    if not versions:
        raise RequestError(f"No template is called {args.id!r}. See 'strongroom template list'.")
    stage = rollout.stages.get(args.id, Stage(stable=source.newest(versions)))
    if args.subject is not None:
        candidate = stage.candidate or stage.stable
        version = rollout.version_for(args.id, args.subject) or stage.stable
        print(
            json.dumps({"version": version, "bucket": bucket(args.id, candidate, args.subject)})
            if args.json
            else version
        )
        return 0
    changed = _change_stage(stage, args)
    if changed != stage or args.id not in rollout.stages:
        rollout.stages[args.id] = changed
        rollout.verify(loaded.templates)
        rollout_path.write_bytes(rollout.encode())
    print(json.dumps(dataclasses.asdict(changed)) if args.json else _describe(args.id, changed))
    return 0


def _change_stage(stage: Stage, args: argparse.Namespace) -> Stage:
    if args.percent is not None and not 0 <= args.percent <= 100:
        raise RequestError("--percent must be from 0 to 100.")
    if args.back:
        return Stage(stable=stage.stable)
    if args.promote:
        if stage.candidate is None:
            raise RequestError("There is no candidate to promote. Name one with --to.")
        return Stage(stable=stage.candidate)
    return Stage(
        stable=args.stable or stage.stable,
        candidate=args.to or stage.candidate,
        percent=stage.percent if args.percent is None else args.percent,
        shadow=args.shadow,
    )


def _describe(name: str, stage: Stage) -> str:
    if stage.candidate is None:
        return f"{name}: everybody gets {stage.stable}."
    if stage.shadow:
        return f"{name}: everybody gets {stage.stable}; {stage.candidate} is composed in shadow."
    return f"{name}: {stage.percent:g} % of subjects get {stage.candidate}, the others {stage.stable}."


def _find(loaded: TemplateRegistry, name: str, version: str | None) -> source.Template:
    versions = loaded.templates.get(name, {})
    template = versions.get(version or (source.newest(versions) if versions else ""))
    if template is None:
        raise RequestError(f"No template is called {name!r} {version or ''}. See 'strongroom template list'.")
    return template


def _parse_variables(pairs: list[str]) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for pair in pairs:
        name, found, value = pair.partition("=")
        if not found:
            raise RequestError(f"--set takes NAME=VALUE, not {pair!r}.")
        variables[name] = {"true": True, "false": False}.get(value, int(value) if value.isdecimal() else value)
    return variables


def _load_key(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as err:
        raise ConfigError(f"{path} is not a readable PEM private key without a passphrase.") from err
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"{path} is not an Ed25519 key. Make one with 'openssl genpkey -algorithm ed25519'.")
    return key
