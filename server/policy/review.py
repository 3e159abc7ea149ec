"""Looks for a question that each policy decides; a permit or forbid for which none is found is probably a mistake."""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.policy.cedar import PolicySet, Question
from server.policy.permissions import Permission

if TYPE_CHECKING:
    from collections.abc import Iterator

    from server.policy.cedar import Rule

# What a question holds by itself, beside the values that the policies compare with.
_USUAL: dict[str, tuple[Any, ...]] = {
    "tenant": ("default",),
    "subject": ("someone",),
    "method": ("api_key", "oidc", "mtls"),
    "stage": ("live", "canary", "candidate", "retired"),
    "classification": ("internal", "public", "confidential", "restricted"),
    "licence": ("",),
    "wire": ("openai.chat", "openai.completion", "openai.response", "anthropic.message", "mistral.fim"),
    "data": ("internal", "public", "confidential", "restricted", "unheard-of"),
    "tokens": (512, 1 << 20),
    "stream": (False, True),
    "client": ("",),
    "hour": (12, 3, 20),
    "weekday": (3, 6),
    "network": ("10.0.0.1", "203.0.113.9", "2001:db8::1"),
    "scopes": (frozenset({"*"}),),
    "model": ("some-model",),
}
_COMPARISONS = frozenset(
    {"==", "!=", "<", "<=", ">", ">=", "in", "contains", "containsAll", "containsAny", "like", "isInRange"}
)


@dataclass(frozen=True, slots=True)
class Idle:
    """A policy that no question was found for."""

    rule_id: str
    problem: str


def find_idle(policies: PolicySet, *, num_tries: int = 400) -> list[Idle]:
    """Return permits that never permit and forbids that never refuse what would otherwise be permitted.

    The search tries values that the policies themselves compare with, the values next to them, and usual ones; always
    the same. A witness proves that a policy is of use; no witness is a strong hint, not a proof.
    """
    domain, groups = _collect([rule.source for rule in policies.rules.values()])
    return [
        Idle(rule.id, problem)
        for rule in policies.rules.values()
        if (problem := _find_problem(policies, rule.id, domain, groups, num_tries)) is not None
    ]


def _find_problem(
    policies: PolicySet, rule_id: str, domain: dict[str, tuple[Any, ...]], groups: tuple[str, ...], num_tries: int
) -> str | None:
    rule = policies.rules[rule_id]
    alone = PolicySet({rule_id: rule}, policies.digest)
    without = PolicySet({key: value for key, value in policies.rules.items() if key != rule_id}, policies.digest)
    # A forbid bites only where something is permitted: it is tried on what each permit is about, in turn.
    partners = [rule]
    if rule.effect == "forbid":
        partners = [one for one in policies.rules.values() if one.effect == "permit" and one.actions & rule.actions]
    applies = False
    for number in range(num_tries if partners else 0):
        partner = partners[number % len(partners)]
        question = _draw(f"{rule_id}/{number}", rule, partner, domain, groups)
        if rule_id not in alone.ask(question).policies:
            continue
        applies = True
        decision = policies.ask(question)
        if rule.effect == "permit" and decision.allowed:
            return None
        if rule.effect == "forbid" and not decision.allowed and without.ask(question).allowed:
            return None
    if rule.effect == "forbid" and (applies or not partners):
        return "wherever it was found to apply, nothing would have been permitted anyway"
    return "wherever it was found to apply, a forbid refuses" if applies else "no request was found that it applies to"


def _draw(
    seed: str, rule: Rule, partner: Rule, domain: dict[str, tuple[Any, ...]], groups: tuple[str, ...]
) -> Question:
    # The same draws in every run: a review that comes out differently twice is of no use in a build.
    draws = iter(hashlib.shake_256(seed.encode()).digest(64))
    own, own_groups = _collect([rule.source])
    others, partner_groups = _collect([partner.source])
    named = others | own

    def pick(choices: tuple[Any, ...]) -> Any:
        return choices[next(draws) % len(choices)]

    def value(name: str) -> Any:
        usual, chance = _USUAL[name], next(draws) % 8
        if chance < 6 and name in named:  # mostly what the policy itself compares with
            return pick(named[name])
        return pick(domain.get(name, usual)) if chance == 7 else usual[0] if chance % 2 else pick(usual)

    mine = frozenset(own_groups) | frozenset(partner_groups)
    members: frozenset[str] = pick((mine, mine, frozenset(groups), frozenset({pick((*groups, ""))})))
    return Question(
        subject=value("subject"),
        tenant=value("tenant"),
        groups=members - {""},
        scopes=value("scopes"),
        method=value("method"),
        action=Permission(pick(tuple(sorted(rule.actions & partner.actions)))),
        model=value("model"),
        stage=value("stage"),
        classification=value("classification"),
        licence=value("licence"),
        wire=value("wire"),
        num_tokens=max(1, value("tokens")),
        stream=value("stream"),
        data=value("data"),
        address=value("network"),
        client=value("client"),
        hour=value("hour") % 24,
        weekday=(value("weekday") - 1) % 7 + 1,
    )


def _collect(sources: list[dict[str, Any]]) -> tuple[dict[str, tuple[Any, ...]], tuple[str, ...]]:
    """Return the values that policies compare each attribute with, and the groups they name."""
    found: dict[str, set[Any]] = {}
    groups: set[str] = set()
    for source in sources:
        for part in ("principal", "resource"):
            _note_entity(source.get(part, {}).get("entity"), found, groups)
        for condition in source.get("conditions", ()):
            _walk(condition["body"], found, groups)
    domain = {name: tuple(sorted(values, key=repr)) for name, values in found.items() if name in _USUAL}
    return domain, tuple(sorted(groups))


def _walk(node: Any, found: dict[str, set[Any]], groups: set[str]) -> None:
    if isinstance(node, list):
        for one in node:
            _walk(one, found, groups)
        return
    if not isinstance(node, dict):
        return
    for name, inside in node.items():
        if name in _COMPARISONS:
            literals = list(_literals(inside, groups, found))
            for attribute in _attributes(inside):
                for literal in literals:
                    found.setdefault(attribute, set()).update(_near(attribute, literal))
        elif name == ".":
            attribute = inside.get("attr")
            if attribute == "stream":  # a bare boolean is compared with nothing
                found.setdefault(attribute, set()).update((True, False))
        _walk(inside, found, groups)


def _near(attribute: str, literal: Any) -> Iterator[Any]:
    if attribute == "scopes":
        if isinstance(literal, str):
            yield from (frozenset({"*", literal}), frozenset({"*"}))
    elif attribute == "network":
        if isinstance(literal, str):
            try:
                network = ipaddress.ip_network(literal, strict=False)
            except ValueError:
                return
            yield from (str(network.network_address), "203.0.113.9", "10.255.255.254")
    elif isinstance(_USUAL.get(attribute, ("",))[0], bool):
        yield from (True, False)
    elif isinstance(_USUAL.get(attribute, ("",))[0], int):
        if isinstance(literal, int):
            yield from (literal - 1, literal, literal + 1)
    elif isinstance(literal, str):
        yield from (literal, "something-else")


def _attributes(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for one in node:
            yield from _attributes(one)
    elif isinstance(node, dict):
        if isinstance(node.get("."), dict):
            yield node["."]["attr"]
        for inside in node.values():
            yield from _attributes(inside)


def _literals(node: Any, groups: set[str], found: dict[str, set[Any]]) -> Iterator[Any]:
    if isinstance(node, list):
        if node and all((isinstance(one, dict) and ("Literal" in one)) or one == "Wildcard" for one in node):
            yield "".join(one["Literal"] if isinstance(one, dict) else "" for one in node)
            return
        for one in node:
            yield from _literals(one, groups, found)
    elif isinstance(node, dict):
        if "Value" in node:
            held = node["Value"]
            if isinstance(held, dict) and "__entity" in held:
                _note_entity(held["__entity"], found, groups)
            elif isinstance(held, (str, int)):
                yield held
        for inside in node.values():
            yield from _literals(inside, groups, found)


def _note_entity(entity: dict[str, str] | None, found: dict[str, set[Any]], groups: set[str]) -> None:
    if entity is None:
        return
    if entity["type"] == "Group":
        groups.add(entity["id"])
    elif entity["type"] == "Model":
        found.setdefault("model", set()).add(entity["id"])
    elif entity["type"] == "User":
        tenant, _, subject = entity["id"].partition("/")
        found.setdefault("tenant", set()).add(tenant)
        found.setdefault("subject", set()).add(subject)
