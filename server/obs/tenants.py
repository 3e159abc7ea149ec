"""What each tenant asks and gets: plain integers, put into Prometheus' form only when somebody reads them."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from typing_extensions import override

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import Metric

    from server.types import Outcome

MAX_TENANTS = 500
"""Tenants with series of their own; a store of metrics pays for every one. Later ones are counted together, as …"""

OTHERS = "(others)"
"""… this, which can be no tenant's name."""

FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class TenantCounts:
    """The counts of one tenant."""

    __slots__ = ("cached", "completion", "errors", "first_tokens", "first_tokens_s", "outcomes", "prompt")

    def __init__(self) -> None:
        self.outcomes: dict[str, int] = {}
        self.errors: dict[str, int] = {}
        self.prompt = 0
        self.cached = 0
        self.completion = 0
        self.first_tokens = [0] * (len(FIRST_TOKEN_S) + 1)
        self.first_tokens_s = 0.0

    def first_token(self, seconds: float) -> None:
        """Count a request's time to first token."""
        self.first_tokens[bisect_left(FIRST_TOKEN_S, seconds)] += 1
        self.first_tokens_s += seconds

    def finished(self, outcome: Outcome) -> None:
        """Count a request that has ended."""
        self.outcomes[outcome.status] = self.outcomes.get(outcome.status, 0) + 1
        if outcome.error_code is not None:
            self.errors[outcome.error_code] = self.errors.get(outcome.error_code, 0) + 1
        usage = outcome.usage
        self.prompt += usage.prompt_tokens
        self.cached += usage.cached_tokens
        self.completion += usage.completion_tokens


class TenantMetrics(Collector):
    """The counts of all tenants, up to `max_tenants`."""

    def __init__(self, max_tenants: int = MAX_TENANTS) -> None:
        self._max_tenants = max_tenants
        self._counts: dict[str, TenantCounts] = {}

    def of(self, tenant: str) -> TenantCounts:
        """Return where this tenant is counted."""
        counts = self._counts.get(tenant)
        if counts is None:
            name = tenant if len(self._counts) < self._max_tenants else OTHERS
            counts = self._counts.setdefault(name, TenantCounts())
        return counts

    @override
    def collect(self) -> Iterator[Metric]:
        """Yield the series of all tenants."""
        return _families(self._counts)

    def view(self, tenant: str) -> Collector:
        """Return what one tenant may see: its own series, and no sign of another's."""
        counts = self._counts.get(tenant)
        return _View({} if counts is None else {tenant: counts})


class _View(Collector):
    def __init__(self, counts: dict[str, TenantCounts]) -> None:
        self._counts = counts

    @override
    def collect(self) -> Iterator[Metric]:
        return _families(self._counts)


def _families(every: dict[str, TenantCounts]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "strongroom_tenant_requests", "Requests to models by tenant and outcome.", labels=("tenant", "outcome")
    )
    errors = CounterMetricFamily(
        "strongroom_tenant_errors",
        "Requests to models that were refused or failed, by tenant and error code.",
        labels=("tenant", "code"),
    )
    tokens = CounterMetricFamily(
        "strongroom_tenant_tokens",
        "Tokens by tenant and kind (prompt, cached, completion).",
        labels=("tenant", "kind"),
    )
    first_tokens = HistogramMetricFamily(
        "strongroom_tenant_time_to_first_token_seconds",
        "Time from a request's first byte to its first token, by tenant.",
        labels=("tenant",),
    )
    for tenant, counts in list(every.items()):
        for outcome, number in list(counts.outcomes.items()):
            requests.add_metric((tenant, outcome), number)
        for code, number in list(counts.errors.items()):
            errors.add_metric((tenant, code), number)
        for kind, number in (("prompt", counts.prompt), ("cached", counts.cached), ("completion", counts.completion)):
            tokens.add_metric((tenant, kind), number)
        buckets, sum_so_far = [], 0
        for limit, number in zip((*map(str, FIRST_TOKEN_S), "+Inf"), counts.first_tokens, strict=True):
            sum_so_far += number
            buckets.append((limit, float(sum_so_far)))
        first_tokens.add_metric((tenant,), buckets, counts.first_tokens_s)
    yield requests
    yield errors
    yield tokens
    yield first_tokens
