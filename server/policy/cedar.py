"""One policy set: a question to a decision with obligations; pure, deny by default. The only file that knows Cedar."""

from __future__ import annotations

import hashlib
import ipaddress
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import cedarpy

from server.errors import ConfigError
from server.policy.obligations import merge_obligations, parse_obligations
from server.policy.permissions import ON_A_MODEL, Permission
from server.types import Decision, Obligations

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

MAX_POLICY_BYTES = 1 << 20
MAX_SLICES = 1024
SCHEMA_NAME = "schema.cedarschema"


class Question(NamedTuple):
    """Everything that a decision may depend on; equal questions have equal answers under one policy set.

    `num_tokens` is an estimate, rounded up to a power of two, and `client` is the product name that the caller claims:
    neither is proof of anything.
    """

    subject: str
    tenant: str
    groups: frozenset[str]
    scopes: frozenset[str]
    method: str
    action: str
    model: str = ""
    stage: str = ""
    classification: str = ""
    licence: str = ""
    wire: str = ""
    num_tokens: int = 0
    stream: bool = False
    data: str = "internal"
    address: str = "127.0.0.1"
    client: str = ""
    hour: int = 12
    weekday: int = 1


@dataclass(frozen=True, slots=True)
class Rule:
    """One policy as loaded: what it is about and what it demands; `source` is Cedar's JSON form of it."""

    id: str
    effect: str
    description: str
    actions: frozenset[str]
    obligations: Obligations
    file: str
    source: dict[str, Any]


class PolicySet:
    """A validated set of policies.

    `reads` names the fields of a question that some policy looks at, beside groups, scopes, action and model. Others
    can't change an answer, so a caller may leave them out, and more questions are equal.

    Args:
        rules: By id.
        digest: Lowercase hex SHA-256 over schema and policies.
    """

    def __init__(self, rules: dict[str, Rule], digest: str) -> None:
        self.rules = rules
        self.digest = digest
        self.reads = _find_reads([rule.source for rule in rules.values()])
        self._handle = _compile(rules.values())
        self._groups = {rule_id: _named_group(rule.source["principal"]) for rule_id, rule in rules.items()}
        self._named_groups = frozenset(name for name in self._groups.values() if name is not None)
        self._slices: dict[tuple[str, frozenset[str]], cedarpy.PolicySet] = {}

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read `schema.cedarschema` and every `*.cedar` of a folder, and validate all of it.

        Raises:
            ConfigError: A file is missing, does not parse, does not fit the schema, or a permit that reaches a model
                lacks an obligation.
        """
        schema_text = _read(folder / SCHEMA_NAME)
        files = sorted(folder.glob("*.cedar"))
        if not files:
            raise ConfigError(f"There is no policy in {folder}; without one nothing is permitted. See docs/policy.md.")
        texts = {path.name: _read(path) for path in files}
        rules: dict[str, Rule] = {}
        for name, text in texts.items():
            for rule in _parse(name, text):
                if rule.id in rules:
                    raise ConfigError(
                        f"{name}: policy id '{rule.id}' is used twice; the other is in {rules[rule.id].file}"
                    )
                rules[rule.id] = rule
        if not rules:
            raise ConfigError(f"The files in {folder} hold no policy; without one nothing is permitted.")
        _validate("\n".join(texts.values()), schema_text)
        digest = hashlib.sha256()
        for name, text in [(SCHEMA_NAME, schema_text), *texts.items()]:
            digest.update(f"{name}\0{len(text.encode())}\0".encode() + text.encode())
        loaded = cls(dict(sorted(rules.items())), digest.hexdigest())
        loaded._probe(schema_text)
        return loaded

    def ask(self, question: Question) -> Decision:
        """Answer a question; every failure to answer is a refusal."""
        request, entities = _translate(question)
        try:
            result = cedarpy.is_authorized(request, self._slice(question), entities)
        except ValueError:
            return Decision(False, "the question could not be put, so nothing is permitted", (), self.digest)
        reasons = tuple(sorted(result.diagnostics.reasons))
        if result.diagnostics.errors:
            # Cedar leaves out a policy that fails; were it a forbid, leaving it out would permit.
            return Decision(False, "a policy could not be evaluated, so nothing is permitted", reasons, self.digest)
        if not result.allowed:
            return Decision(False, self._explain(reasons, question), reasons, self.digest)
        obligations = merge_obligations(self.rules[rule_id].obligations for rule_id in reasons)
        return Decision(True, f"permitted by {', '.join(reasons)}", reasons, self.digest, obligations)

    def _slice(self, question: Question) -> cedarpy.PolicySet:
        """Return the policies whose head can match this action and these groups.

        The others can neither apply nor fail: Cedar looks at a policy's conditions only when its head matches, the
        actions of a head are listed one by one, and a caller's groups are all that it is in. With 200 policies this
        is a third of the time that asking all of them takes.
        """
        groups = question.groups & self._named_groups
        found = self._slices.get((question.action, groups))
        if found is None:
            if len(self._slices) >= MAX_SLICES:
                self._slices.clear()
            found = self._slices[(question.action, groups)] = _compile(
                rule
                for rule in self.rules.values()
                if question.action in rule.actions
                and (self._groups[rule.id] is None or self._groups[rule.id] in groups)
            )
        return found

    def _explain(self, reasons: tuple[str, ...], question: Question) -> str:
        if not reasons:
            return f"no policy permits {question.action} here"
        told = [self.rules[rule_id].description or "no description" for rule_id in reasons]
        return "; ".join(f"forbidden by {rule_id} ({text})" for rule_id, text in zip(reasons, told, strict=True))

    def _probe(self, schema_text: str) -> None:
        """Ask one question of each permission with the schema, so that later questions need no check of their form."""
        schema = cedarpy.Schema.from_str(schema_text)
        for permission in Permission:
            request, entities = _translate(
                Question("s", "t", frozenset({"g"}), frozenset({"x"}), "api_key", permission, "m")
            )
            try:
                errors = cedarpy.is_authorized(request, self._handle, entities, schema).diagnostics.errors
            except ValueError as error:
                errors = [str(error)]
            if any("schema" in text or "request" in text or "entit" in text for text in errors):
                raise ConfigError(f"{SCHEMA_NAME} does not fit a question for {permission}: {errors[0][:300]}")


def _compile(rules: Iterable[Rule]) -> cedarpy.PolicySet:
    policies = {rule.id: rule.source for rule in rules}
    return cedarpy.PolicySet.from_json_str(
        json.dumps({"staticPolicies": policies, "templates": {}, "templateLinks": []})
    )


def _named_group(head: dict[str, Any]) -> str | None:
    """Return the group that a policy's head demands of the principal; None where it demands none."""
    if head["op"] == "in":
        entity = head["entity"]
    elif head["op"] == "is" and "in" in head:
        entity = head["in"]["entity"]
    else:
        return None
    return str(entity["id"]) if entity["type"] == "Group" else None


def _translate(question: Question) -> tuple[dict[str, Any], str]:
    user = {"type": "User", "id": f"{question.tenant}/{question.subject}"}
    groups = [{"type": "Group", "id": name} for name in sorted(question.groups)]
    context: dict[str, Any] = {
        "network": {"__extn": {"fn": "ip", "arg": _network(question.address)}},
        "client": question.client,
        "hour": question.hour,
        "weekday": question.weekday,
    }
    if question.action in ON_A_MODEL:
        resource = {"type": "Model", "id": question.model}
        attributes = {
            "stage": question.stage,
            "classification": question.classification,
            "licence": question.licence,
        }
        context |= {
            "wire": question.wire,
            "tokens": question.num_tokens,
            "stream": question.stream,
            "data": question.data,
        }
    else:
        resource = {"type": "Service", "id": "strongroom"}
        attributes = {}
    entities = [
        {
            "uid": user,
            "attrs": {
                "subject": question.subject,
                "tenant": question.tenant,
                "method": question.method,
                "scopes": sorted(question.scopes),
            },
            "parents": groups,
        },
        {"uid": resource, "attrs": attributes, "parents": []},
    ]
    request = {
        "principal": user,
        "action": {"type": "Action", "id": question.action},
        "resource": resource,
        "context": context,
    }
    return request, json.dumps(entities)


_ATTRIBUTES = {
    "subject": "subject", "tenant": "tenant", "method": "method", "stage": "stage", "classification": "classification",
    "licence": "licence", "wire": "wire", "tokens": "num_tokens", "stream": "stream", "data": "data",
    "network": "address", "client": "client", "hour": "hour", "weekday": "weekday",
}  # fmt: skip


def _find_reads(node: Any) -> frozenset[str]:
    """Return the fields of a question that a policy in Cedar's JSON form may look at."""
    found: set[str] = set()
    if isinstance(node, dict):
        if node.get("type") == "User":  # a person is named, so it matters who asks
            found |= {"subject", "tenant"}
        if node.get("Var") == "context":  # the context as a whole: see below for the usual way to an attribute of it
            found |= set(_ATTRIBUTES.values())
        for name, inside in node.items():
            if name in (".", "has") and isinstance(inside, dict) and "attr" in inside:
                if inside["attr"] in _ATTRIBUTES:
                    found.add(_ATTRIBUTES[inside["attr"]])
                if inside["left"] != {"Var": "context"}:
                    found |= _find_reads(inside["left"])
            elif name != "annotations":
                found |= _find_reads(inside)
    elif isinstance(node, list):
        for one in node:
            found |= _find_reads(one)
    return frozenset(found)


def _network(address: str) -> str:
    """Return an address as Cedar reads it; one that is none (a unix socket) becomes 0.0.0.0, which no network holds."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "0.0.0.0"  # noqa: S104  # nothing is bound to it
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


def _parse(file: str, text: str) -> list[Rule]:
    try:
        parsed = json.loads(cedarpy.policies_to_json_str(text))
    except ValueError as error:
        raise ConfigError(f"{file} does not parse: {str(error)[:500]}") from error
    if parsed.get("templates"):
        raise ConfigError(f"{file} holds a policy template (?principal or ?resource); write it out as a policy")
    rules = []
    for source in parsed["staticPolicies"].values():
        annotations = source.get("annotations", {})
        rule_id = annotations.get("id") or ""
        if not rule_id or not all(letter.isalnum() or letter in "-_." for letter in rule_id) or len(rule_id) > 64:
            raise ConfigError(f'{file}: every policy needs an id of letters, digits and dashes: @id("developers-chat")')
        actions = _actions(rule_id, source["action"])
        obligations = parse_obligations(rule_id, annotations, actions, source["effect"])
        description = (annotations.get("description") or "")[:200]
        rules.append(Rule(rule_id, source["effect"], description, actions, obligations, file, source))
    return rules


def _actions(rule_id: str, scope: dict[str, Any]) -> frozenset[str]:
    if scope["op"] == "All":
        return frozenset(Permission)
    named = scope.get("entities") or [scope["entity"]]
    found = frozenset(entity["id"] for entity in named)
    unknown = found - frozenset(Permission)
    if unknown:
        raise ConfigError(f"Policy '{rule_id}': '{min(unknown)}' is no permission; known are {', '.join(Permission)}")
    return found


def _validate(text: str, schema_text: str) -> None:
    try:
        result = cedarpy.validate_policies(text, schema_text)
    except ValueError as error:
        raise ConfigError(f"{SCHEMA_NAME} or a policy does not parse: {str(error)[:500]}") from error
    if not result.validation_passed:
        names = result.id_annotations_by_policy_id
        told = [f"{names.get(error.policy_id, error.policy_id)}: {error.error}" for error in result.errors[:5]]
        raise ConfigError("The policies do not fit the schema: " + "; ".join(told)[:1000])


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"The policy file {path} can't be read ({error.strerror}).") from error
    if len(content) > MAX_POLICY_BYTES:
        raise ConfigError(f"The policy file {path} is larger than {MAX_POLICY_BYTES} bytes.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"The policy file {path} is not UTF-8.") from error
