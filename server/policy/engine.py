"""Answers the pipeline's questions from the policy set in force, and remembers the answers."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Self

from server.policy.cedar import SCHEMA_NAME, PolicySet, Question
from server.policy.permissions import GENERATING, ON_A_MODEL, covers
from server.store.incidents import Quarantine, Quarantined
from server.types import Chat, Completion, Decision, Embedding

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import tzinfo
    from pathlib import Path

    from server.types import Client, ModelRequest, Payload, Principal

MAX_REMEMBERED = 65536
MAX_CLIENT_CHARS = 40
# Text is put into tokens at about four characters each; three estimates on the high side.
_CHARS_PER_TOKEN = 3


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What policy may know of a model; `classification` is the highest class of data that it is cleared for.

    `base` is the model whose adapter it is; what takes that out of service takes this with it.
    """

    stage: str = "live"
    classification: str = "confidential"
    licence: str = ""
    base: str = ""


class PolicyEngine:
    """Implements `ports.Policy`.

    Args:
        policies: The set in force at the start.
        folder: Where `reload` reads the next one.
        models: Facts of a model by its name, None for one that is not served.
        quarantine: What the incident switch took out of service.
        zone: The time zone of `hour` and `weekday` in policies.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        policies: PolicySet,
        *,
        folder: Path,
        models: Callable[[str], ModelFacts | None],
        quarantine: Quarantine,
        zone: tzinfo = UTC,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._in_force: tuple[PolicySet, OrderedDict[Question, Decision]] = (policies, OrderedDict())
        self._folder = folder
        self._models = models
        self._quarantine = quarantine
        self._zone = zone
        self._clock = clock
        self._quarter = -1
        self._hour_weekday = (0, 1)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        models: Callable[[str], ModelFacts | None],
        quarantine: Quarantine | None = None,
        zone: tzinfo = UTC,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Load the policies of a folder.

        Raises:
            ConfigError: They are missing or wrong; see `PolicySet.load`.
        """
        return cls(
            PolicySet.load(folder),
            folder=folder,
            models=models,
            quarantine=quarantine or Quarantine(),
            zone=zone,
            clock=clock,
        )

    @property
    def current(self) -> PolicySet:
        """The set in force."""
        return self._in_force[0]

    def reload(self) -> tuple[str, str]:
        """Read the folder again and put the new set in force; return the digests before and after.

        Raises:
            ConfigError: The new set is wrong; the old one stays in force.
        """
        before = self.current.digest
        fresh = self.read_next()
        self.adopt(fresh)
        return before, fresh.digest

    def read_next(self) -> PolicySet:
        """Read the folder again, without putting it in force.

        Raises:
            ConfigError: The new set is wrong.
        """
        return PolicySet.load(self._folder)

    def adopt(self, policies: PolicySet) -> None:
        """Put a set in force."""
        # One assignment of both, and a new dict: an answer of the old set that is being written goes to the old one.
        self._in_force = (policies, OrderedDict())

    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Return names, times and sizes of the folder's files; it differs when one was changed."""
        found = []
        for path in sorted([*self._folder.glob("*.cedar"), self._folder / SCHEMA_NAME]):
            try:
                info = path.stat()
            except OSError:
                continue  # gone: the stamp differs by its absence
            found.append((path.name, info.st_mtime_ns, info.st_size))
        return tuple(found)

    def _is_quarantined(self, model: str) -> bool:
        facts = self._models(model)
        names = (model, facts.base) if facts is not None and facts.base else (model,)
        return any(self._quarantine.has(Quarantined.MODEL, name) for name in names)

    def decide(self, principal: Principal, action: str, request: ModelRequest | None, client: Client) -> Decision:
        """Return the decision with its reason; never raises for a refusal.

        Args:
            principal: Who asks.
            action: A `Permission`.
            request: What is asked of a model; None for what is asked of the service.
            client: Where the request came from.
        """
        policies, answers = self._in_force
        if not covers(principal.scopes, action):
            return Decision(False, f"the credential's scopes do not reach {action}", (), policies.digest)
        if request is not None and not self._quarantine.is_empty and self._is_quarantined(request.model):
            return Decision(False, "this model is quarantined", (), policies.digest)
        question = self.form_question(principal, action, request, client)
        if question is None:
            return Decision(False, "there is no such model", (), policies.digest)
        decision = answers.get(question)
        if decision is None:
            decision = policies.ask(question)
            answers[question] = decision
            if len(answers) > MAX_REMEMBERED:
                answers.popitem(last=False)
        else:
            answers.move_to_end(question)
        if not self._quarantine.is_empty and decision.allowed and action in GENERATING:
            for template in decision.obligations.templates:
                if self._quarantine.has(Quarantined.TEMPLATE, template):
                    return Decision(False, "a template that policy demands is quarantined", (), policies.digest)
        if decision.allowed and decision.obligations.tools_allowed is not None and request is not None:
            return _judge_tools(decision, request.payload)
        return decision

    def form_question(
        self, principal: Principal, action: str, request: ModelRequest | None, client: Client
    ) -> Question | None:
        """Return what will be asked of the policies; None where the model is not served.

        What no policy of the set in force looks at is left out: it can't change the answer.
        """
        reads = self.current.reads
        hour, weekday = self._now() if "hour" in reads or "weekday" in reads else (0, 1)
        name = client.user_agent.partition("/")[0][:MAX_CLIENT_CHARS].lower() if "client" in reads else ""
        address = client.address if "address" in reads else ""
        reads_who = "subject" in reads or "tenant" in reads
        subject = principal.subject if reads_who else ""
        tenant = principal.tenant if reads_who else ""
        method = principal.method if "method" in reads else ""
        if request is None or action not in ON_A_MODEL:
            return Question(
                subject,
                tenant,
                principal.groups,
                principal.scopes,
                method,
                action,
                address=address,
                client=name,
                hour=hour,
                weekday=weekday,
            )
        facts = self._models(request.model)
        if facts is None:
            return None
        num_tokens = 1 << (estimate_tokens(request.payload) - 1).bit_length() if "num_tokens" in reads else 0
        return Question(
            subject,
            tenant,
            principal.groups,
            principal.scopes,
            method,
            action,
            request.model,
            facts.stage,
            facts.classification,
            facts.licence,
            request.wire_format if "wire" in reads else "",
            num_tokens,
            request.stream if "stream" in reads else False,
            "internal" if request.classification is None else request.classification,
            address,
            name,
            hour,
            weekday,
        )

    def _now(self) -> tuple[int, int]:
        now_s = self._clock()
        quarter = int(now_s // 900)  # zones are offset by whole quarters of an hour
        if quarter != self._quarter:
            moment = datetime.fromtimestamp(now_s, tz=self._zone)
            self._hour_weekday = (moment.hour, moment.isoweekday())
            self._quarter = quarter
        return self._hour_weekday


def _judge_tools(decision: Decision, payload: Payload) -> Decision:
    """Return the decision, or a refusal where the request brings a tool that the permit does not name."""
    allowed = decision.obligations.tools_allowed or ()
    offered = payload.tools if isinstance(payload, Chat) else ()
    if all(tool["function"]["name"] in allowed for tool in offered):
        return decision
    reason = f"policy allows {'no tools but ' + ', '.join(allowed) if allowed else 'no tools'} in this request"
    return Decision(False, reason, decision.policies, decision.policy_digest)


def estimate_tokens(payload: Payload) -> int:
    """Return about how many tokens the client's text comes to, at least 1; made to be cheap, not to be exact."""
    chars = 0
    if isinstance(payload, Chat):
        for message in payload.messages:
            content = message.get("content")
            if isinstance(content, str):
                chars += len(content)
            elif content:
                chars += sum(len(part.get("text") or "") for part in content)
    elif isinstance(payload, Completion):
        chars = len(payload.prompt) + len(payload.suffix or "")
    elif isinstance(payload, Embedding):
        chars = sum(map(len, payload.inputs))
    return 1 + chars // _CHARS_PER_TOKEN
