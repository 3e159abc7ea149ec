"""Annotations of a permit to obligations; when several permits apply, the strictest of each stands."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from server.errors import ConfigError
from server.policy.permissions import GENERATING, WITHOUT_TURNS
from server.types import Obligations, ScanMode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# From lenient to strict; the guard's modes are ordered by what may leave.
_SCAN_MODES = (ScanMode.OFF, ScanMode.ANNOTATE, ScanMode.REDACT, ScanMode.REPAIR, ScanMode.BLOCK)
# What may stand in for a template where the wire format has no turns, from weak to strong; see docs/templates.md.
STAND_INS = ("none", "raw", "fim", "comment-preamble", "template-as-text")
MAX_TOKENS_CEILING = 1_000_000
MAX_BANNED = 64
MAX_BANNED_CHARS = 64
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)
_YES_NO = {"yes": True, "no": False}
_KNOWN = frozenset(
    {
        "id",
        "description",
        "template",
        "stand_in",
        "scan_input",
        "scan_output",
        "max_tokens",
        "tools",
        "ban_tokens",
        "audit_text",
        "egress_findings",
        "store_responses",
    }
)


def parse_obligations(
    policy_id: str, annotations: Mapping[str, str | None], actions: frozenset[str], effect: str
) -> Obligations:
    """Read what a policy demands.

    Args:
        policy_id: For the error message.
        annotations: As written in the policy.
        actions: What the policy is about.
        effect: `permit` or `forbid`.

    Raises:
        ConfigError: An annotation is unknown or malformed, or a permit that reaches a model lacks one.
    """

    def refuse(problem: str) -> ConfigError:
        return ConfigError(f"Policy '{policy_id}': {problem}")

    given = {name: (value or "") for name, value in annotations.items()}
    unknown = set(given) - _KNOWN
    if unknown:
        raise refuse(
            f"unknown annotation @{min(unknown)}; known are {', '.join('@' + name for name in sorted(_KNOWN))}"
        )
    if effect == "forbid":
        if set(given) - {"id", "description"}:
            raise refuse("a forbid carries only @id and @description")
        return Obligations()

    required = set()
    if actions & GENERATING:
        required |= {"scan_input", "scan_output", "max_tokens"}
    if actions & (GENERATING - WITHOUT_TURNS):
        required.add("template")
    if actions & WITHOUT_TURNS:
        required |= {"template", "stand_in"}
    missing = required - set(given)
    if missing:
        raise refuse(f"it lets a model compute and so must carry {', '.join('@' + name for name in sorted(missing))}")

    def names(annotation: str) -> tuple[str, ...]:
        found = tuple(part.strip() for part in given[annotation].split(","))
        if not all(_NAME.fullmatch(name) for name in found) or len(set(found)) != len(found):
            raise refuse(f"@{annotation} must list different names, separated by commas")
        return found

    def mode(annotation: str) -> ScanMode:
        try:
            return ScanMode(given.get(annotation, ScanMode.ANNOTATE))
        except ValueError:
            raise refuse(f"@{annotation} must be one of {', '.join(_SCAN_MODES)}") from None

    def yes_no(annotation: str, *, default: bool) -> bool:
        if annotation not in given:
            return default
        if given[annotation] not in _YES_NO:
            raise refuse(f'@{annotation} must be "yes" or "no"')
        return _YES_NO[given[annotation]]

    ceiling: int | None = None
    if "max_tokens" in given:
        digits = given["max_tokens"]
        if not (digits.isascii() and digits.isdigit() and 1 <= int(digits[:8]) <= MAX_TOKENS_CEILING):
            raise refuse(f"@max_tokens must be a whole number from 1 to {MAX_TOKENS_CEILING}")
        ceiling = int(digits)
    stand_in = given.get("stand_in", "")
    if stand_in and stand_in not in STAND_INS:
        raise refuse(f"@stand_in must be one of {', '.join(STAND_INS)}")
    tools: tuple[str, ...] | None = None
    if "tools" in given:
        tools = () if given["tools"] == "" else tuple(sorted(part.strip() for part in given["tools"].split(",")))
    bans: tuple[str, ...] = ()
    if "ban_tokens" in given:
        bans = tuple(sorted({part.strip() for part in given["ban_tokens"].split(",")}))
        if len(bans) > MAX_BANNED or not all(
            1 <= len(name) <= MAX_BANNED_CHARS and name.isprintable() for name in bans
        ):
            raise refuse(
                f"@ban_tokens must list 1 to {MAX_BANNED} tokens as they are spelled, separated by commas, each of at "
                f"most {MAX_BANNED_CHARS} characters that can be seen"
            )
    return Obligations(
        templates=names("template") if "template" in given else (),
        stand_in=stand_in,
        scan_input=mode("scan_input"),
        scan_output=mode("scan_output"),
        max_tokens=ceiling,
        tools_allowed=tools,
        ban_tokens=bans,
        audit_text=yes_no("audit_text", default=False),
        egress_findings=yes_no("egress_findings", default=True),
        store_responses=yes_no("store_responses", default=False),
    )


def merge_obligations(applied: Iterable[Obligations]) -> Obligations:
    """Return what is demanded when these permits all apply: templates of all, and the strictest of everything else."""
    all_of = list(applied)
    if len(all_of) == 1:
        return all_of[0]
    if not all_of:
        return Obligations()
    ceilings = [one.max_tokens for one in all_of if one.max_tokens is not None]
    tools = [frozenset(one.tools_allowed) for one in all_of if one.tools_allowed is not None]
    return Obligations(
        templates=tuple(dict.fromkeys(name for one in all_of for name in one.templates)),
        stand_in=max((one.stand_in for one in all_of), key=lambda name: STAND_INS.index(name) if name else -1),
        scan_input=max((one.scan_input for one in all_of), key=_SCAN_MODES.index),
        scan_output=max((one.scan_output for one in all_of), key=_SCAN_MODES.index),
        max_tokens=min(ceilings) if ceilings else None,
        tools_allowed=tuple(sorted(frozenset.intersection(*tools))) if tools else None,
        ban_tokens=tuple(sorted({name for one in all_of for name in one.ban_tokens})),
        audit_text=any(one.audit_text for one in all_of),
        egress_findings=all(one.egress_findings for one in all_of),
        store_responses=all(one.store_responses for one in all_of),
    )
