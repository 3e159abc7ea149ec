"""Prometheus counters and histograms of the gateway, as docs/specs/metrics.md names them; no label holds a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.obs.tenants import TenantMetrics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from server.pipeline import Call

ENGINE_PREFIX = "vllm:"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


def merge_engines(texts: Sequence[str]) -> bytes:
    """Return what several engines say of their models as one exposition: each metric once, with all engines' samples.

    What they say of their processes is left out: it names no model, and two engines would contradict each other.
    """
    comments: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family = ""
        seen_before = set(samples)
        for line in text.splitlines():
            if line.startswith("# "):
                _, _, named = line.partition(" ")
                family = named.split(" ", 2)[1] if named.startswith(("HELP ", "TYPE ")) else ""
                if family.startswith(ENGINE_PREFIX) and family not in seen_before:
                    comments.setdefault(family, []).append(line)
            elif line.startswith(ENGINE_PREFIX) and family:
                samples.setdefault(family, []).append(line)
    lines = [line for family, found in samples.items() for line in (*comments.get(family, ()), *found)]
    return "".join(f"{line}\n" for line in lines).encode()


class Metrics:
    """All metrics of one gateway process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "strongroom_requests",
            "Requests by route, model, HTTP status and outcome.",
            ("route", "model", "status", "outcome"),
            registry=self.registry,
        )
        self._duration = Histogram(
            "strongroom_request_duration_seconds",
            "Time from the first byte of a request to the last of its answer.",
            ("route", "model"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._ttft = Histogram(
            "strongroom_time_to_first_token_seconds",
            "Time from the request's first byte to its first token.",
            ("model",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._tokens = Counter(
            "strongroom_tokens",
            "Tokens by model and kind (prompt, cached, completion).",
            ("model", "kind"),
            registry=self.registry,
        )
        self._findings = Counter(
            "strongroom_guard_findings",
            "Findings in answers, by category and severity.",
            ("category", "severity"),
            registry=self.registry,
        )
        self._scans = Counter(
            "strongroom_guard_scans",
            "Answers by scan state (clean, findings, unscanned).",
            ("state",),
            registry=self.registry,
        )
        self.engine_ready = Gauge(
            "strongroom_engine_ready",
            "1 while the model's engine answers and has passed its self-test.",
            ("model",),
            registry=self.registry,
        )
        self.audit_writable = Gauge(
            "strongroom_audit_writable",
            "1 while the audit writer answers and the newest record became durable; at 0 nothing is answered.",
            registry=self.registry,
        )
        self.audit_cosigned = Gauge(
            "strongroom_audit_cosigned_timestamp_seconds",
            "When a witness last cosigned the audit log; 0: never. It stands still while all refuse or are lost.",
            registry=self.registry,
        )
        self.unsigned_models = Gauge(
            "strongroom_unsigned_models",
            "Models that serve without a trusted signature, as the settings allow.",
            registry=self.registry,
        )
        self._tenants = TenantMetrics()
        self.registry.register(self._tenants)
        self._children: dict[tuple[str, ...], Counter] = {}
        self._histograms: dict[tuple[str, ...], Histogram] = {}

    def first_token(self, call: Call, seconds: float) -> None:
        """Note a request's time to first token."""
        self._histogram(self._ttft, call.model_id).observe(seconds)
        if call.principal is not None:
            self._tenants.of(call.principal.tenant).first_token(seconds)

    def finished(self, call: Call, status: int, seconds: float) -> None:
        """Note the end of a request; `status` 0 stands for a client that left before an answer began."""
        model = call.model_id
        outcome = call.outcome
        self._counter(self._requests, call.route, model, str(status), outcome.status).inc()
        self._histogram(self._duration, call.route, model).observe(seconds)
        if call.principal is not None:
            self._tenants.of(call.principal.tenant).finished(outcome)
        usage = outcome.usage
        if usage.prompt_tokens:
            self._counter(self._tokens, model, "prompt").inc(usage.prompt_tokens)
            self._counter(self._tokens, model, "cached").inc(usage.cached_tokens)
            self._counter(self._tokens, model, "completion").inc(usage.completion_tokens)
        if outcome.scan is not None:
            self._counter(self._scans, outcome.scan.state).inc()
            for finding in outcome.scan.findings:
                self._counter(self._findings, finding.category, finding.severity).inc()

    def text(self) -> bytes:
        """Return the exposition in Prometheus' text format."""
        return generate_latest(self.registry)

    def text_for(self, tenant: str) -> bytes:
        """Return what one tenant may see: sums over all tenants would tell it what the others do."""
        return generate_latest(self._tenants.view(tenant))

    # `labels()` validates and locks at each call; a dict of children halves the cost of a count.
    def _counter(self, metric: Counter, *labels: str) -> Counter:
        key = (metric._name, *labels)
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = metric.labels(*labels)
        return child

    def _histogram(self, metric: Histogram, *labels: str) -> Histogram:
        key = (metric._name, *labels)
        child = self._histograms.get(key)
        if child is None:
            child = self._histograms[key] = metric.labels(*labels)
        return child
