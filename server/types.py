"""Values that travel along the data path; no behaviour beyond their own bookkeeping, no I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NewType

from typing_extensions import override

SubjectId = NewType("SubjectId", str)
TenantId = NewType("TenantId", str)
RequestId = NewType("RequestId", str)


class Secret:
    """A value that must never be printed; `reveal()` is the only way to it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the value; the caller keeps it out of logs, errors and records."""
        return self._value

    @override
    def __repr__(self) -> str:
        return "<redacted>"

    __str__ = __repr__


class WireFormat(StrEnum):
    """The wire formats that reach a model; one file in `server/api/` each."""

    CHAT = "openai.chat"
    COMPLETION = "openai.completion"
    RESPONSE = "openai.response"
    MESSAGE = "anthropic.message"
    EMBEDDING = "openai.embedding"
    FIM = "mistral.fim"
    INFILL = "llamacpp.infill"
    TOKENIZE = "vllm.tokenize"


class ScanMode(StrEnum):
    """What happens with a finding of the guard."""

    OFF = "off"
    ANNOTATE = "annotate"
    REDACT = "redact"
    BLOCK = "block"
    REPAIR = "repair"


class ScanState(StrEnum):
    """What a scan can honestly say of a text; `unscanned` is never turned into `clean`."""

    CLEAN = "clean"
    FINDINGS = "findings"
    UNSCANNED = "unscanned"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the caller offered to prove who it is.

    `values` holds each distinct credential found in the accepted headers (`authorization`, `x-api-key`, `api-key`),
    empty ones left out; `certificate` is the DER of a verified TLS peer certificate.
    """

    values: tuple[Secret, ...] = ()
    malformed: str | None = None
    certificate: bytes | None = None


@dataclass(frozen=True, slots=True)
class Client:
    """Where a request came from; none of it is proof of anything."""

    address: str
    user_agent: str


@dataclass(frozen=True, slots=True)
class Principal:
    """Who the caller is, proved. `method` names the proof: `api_key`, `oidc` or `mtls`."""

    subject: SubjectId
    tenant: TenantId
    groups: frozenset[str]
    scopes: frozenset[str]
    method: str
    credential_id: str
    expires_at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation in OpenAI's message form, whatever wire format it came in; validated, unknown fields dropped.

    `messages` are dicts with `role` in system, developer, user, assistant, tool; `content` is a string or None.
    `tools` are OpenAI function tools.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A raw prompt, with the text after the cursor where the caller gave one (`suffix`)."""

    prompt: str
    suffix: str | None = None


@dataclass(frozen=True, slots=True)
class Embedding:
    """Texts to embed."""

    inputs: tuple[str, ...]
    dimensions: int | None = None


Payload = Chat | Completion | Embedding


@dataclass(frozen=True, slots=True)
class Continuation:
    """How a request of a format with stored answers belongs to them.

    `previous` is the answer that this one follows; `store` says that the caller wants this one kept; the first
    `num_instructions` messages are for this request alone and do not go on to the next.
    """

    previous: str | None = None
    store: bool = False
    num_instructions: int = 0


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One request to a model, whatever its wire format.

    `sampling` holds only engine fields that the wire format's parser has checked (`temperature`, `top_p`, `stop`,
    `seed`, `n`, …); `max_tokens` is what the caller asked for, None for "what is left".
    `redactions` pairs each placeholder that the guard put into the payload with the value it stands for.
    """

    wire_format: WireFormat
    model: str
    payload: Payload
    sampling: dict[str, Any]
    max_tokens: int | None = None
    stream: bool = False
    include_usage: bool = True
    cache_hint: str | None = None
    classification: str | None = None
    redactions: tuple[tuple[str, Secret], ...] = ()
    continuation: Continuation | None = None


@dataclass(frozen=True, slots=True)
class Obligations:
    """What a permit demands; read from the annotations of the policy that permitted.

    `templates` are composed in this order. `stand_in` names what applies where the wire format has no turns.
    `ban_tokens` are spellings of tokens that no answer may have.
    """

    templates: tuple[str, ...] = ()
    stand_in: str = ""
    scan_input: ScanMode = ScanMode.ANNOTATE
    scan_output: ScanMode = ScanMode.ANNOTATE
    max_tokens: int | None = None
    tools_allowed: tuple[str, ...] | None = None
    ban_tokens: tuple[str, ...] = ()
    audit_text: bool = False
    egress_findings: bool = True
    store_responses: bool = False


@dataclass(frozen=True, slots=True)
class Decision:
    """What policy says of one request, and why. `policies` are the ids of the policies that decided."""

    allowed: bool
    reason: str
    policies: tuple[str, ...]
    policy_digest: str
    obligations: Obligations = Obligations()


@dataclass(frozen=True, slots=True)
class TemplateRef:
    """Which security template stands in a prompt; `digest` is lowercase hex SHA-256 of the composed text."""

    id: str
    version: str
    digest: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation for an engine that renders by itself. `mark` has to be taken out of its answer; empty for none."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    mark: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What goes to the engine: token ids made by us, with the text they spell.

    `inputs` holds one list of ids an input where the request has several (embeddings); `token_ids` is empty then.
    `stand_in` names what stands in for the template where the wire format has no turns. `shadow` is the candidate that
    a shadow roll-out would have put there; it is for the record only. `conversation` is for engines that take no ids.
    `banned_ids` are the tokens that policy bans from the answer.
    """

    text: str
    token_ids: list[int]
    template: TemplateRef
    stand_in: str | None = None
    inputs: tuple[list[int], ...] = ()
    shadow: TemplateRef | None = None
    conversation: Conversation | None = None
    banned_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens in all, the security template's among them."""
        return len(self.token_ids) + sum(map(len, self.inputs))


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing a detector found. `start` and `end` are character offsets in the scanned text; no text is kept.

    `where` names the text where a request or an answer has several (`messages[2].content`, `choices[0].reasoning`).
    """

    rule: str
    category: str
    severity: str
    message: str
    start: int
    end: int
    cwe: str | None = None
    line: int | None = None
    language: str | None = None
    fix: str | None = None
    where: str | None = None


@dataclass(frozen=True, slots=True)
class ScanReport:
    """The verdict on one whole text."""

    state: ScanState
    findings: tuple[Finding, ...] = ()
    reason: str | None = None


@dataclass(slots=True)
class Usage:
    """Token counts of one request, as the engine counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @classmethod
    def of_cut_off(cls, prompt_tokens: int, num_events: int, num_chars: int) -> Usage:
        """Return what an answer has cost that the engine did not end, so that nobody counted it.

        An event holds a token or, where nobody reads along or the engine guesses ahead, several: then four characters
        are one, about what code comes to.
        """
        return cls(prompt_tokens, max(num_events, num_chars // 4))

    def add(self, other: Usage) -> None:
        """Add another count to this one."""
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cached_tokens += other.cached_tokens


@dataclass(slots=True)
class Delta:
    """A piece of one choice's answer. Not frozen: that would make each token six times as dear."""

    index: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None
    usage: Usage | None = None
    stop: str | None = None  # of the caller's stop strings, the one that ended the answer
    embedding: list[float] | None = None


@dataclass(slots=True)
class Outcome:
    """How a request ended: `completed`, `denied`, `failed` or `aborted`."""

    status: str = "failed"
    finish_reasons: dict[int, str] = field(default_factory=dict)
    stops: dict[int, str] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    extra_usage: Usage = field(default_factory=Usage)
    scan: ScanReport | None = None
    error_code: str | None = None
    code: tuple[tuple[str, str | None], ...] = ()  # blocks and their languages, where a deeper engine wants them

    def absorb(self, deltas: list[Delta]) -> None:
        """Note the finish reasons and the usage that `deltas` carry."""
        for delta in deltas:
            if delta.finish_reason is not None:
                self.finish_reasons[delta.index] = delta.finish_reason
                if delta.stop is not None:
                    self.stops[delta.index] = delta.stop
            if delta.usage is not None:
                self.usage = delta.usage
                self.usage.add(self.extra_usage)
