"""Counts by tenant: who is counted where, and what a tenant may see."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from server.obs.metrics import Metrics, merge_engines
from server.obs.tenants import OTHERS, TenantMetrics
from server.types import Outcome, Usage


def finished(status="completed", code=None, usage=(0, 0, 0)):
    return Outcome(status=status, error_code=code, usage=Usage(*usage))


def test_each_tenant_has_its_own_series():
    metrics = TenantMetrics()
    metrics.of("north").finished(finished(usage=(10, 4, 6)))
    metrics.of("north").finished(finished(usage=(1, 2, 1)))
    metrics.of("south").finished(finished("denied", "rate_limit_exceeded"))
    text = generate_latest(metrics).decode()
    assert 'strongroom_tenant_requests_total{outcome="completed",tenant="north"} 2.0' in text
    assert 'strongroom_tenant_tokens_total{kind="prompt",tenant="north"} 11.0' in text
    assert 'strongroom_tenant_tokens_total{kind="cached",tenant="north"} 7.0' in text
    assert 'strongroom_tenant_tokens_total{kind="completion",tenant="north"} 6.0' in text
    assert 'strongroom_tenant_requests_total{outcome="denied",tenant="south"} 1.0' in text
    assert 'strongroom_tenant_errors_total{code="rate_limit_exceeded",tenant="south"} 1.0' in text
    assert 'strongroom_tenant_errors_total{code="rate_limit_exceeded",tenant="north"}' not in text


def test_a_view_shows_one_tenant_and_no_sign_of_another():
    metrics = TenantMetrics()
    metrics.of("north").finished(finished())
    alone = generate_latest(metrics.view("north"))
    metrics.of("south").finished(finished("failed", "engine_error"))
    assert generate_latest(metrics.view("north")) == alone
    assert b"south" in generate_latest(metrics.view("south"))
    assert b"tenant=" not in generate_latest(metrics.view("nobody"))


def test_the_number_of_series_is_bounded():
    metrics = TenantMetrics(max_tenants=2)
    for number in range(50):
        for _ in range(2):
            metrics.of(f"tenant-{number}").finished(finished())
    text = generate_latest(metrics).decode()
    assert set(re.findall(r'tenant="([^"]*)"', text)) == {"tenant-0", "tenant-1", OTHERS}
    assert f'strongroom_tenant_requests_total{{outcome="completed",tenant="{OTHERS}"}} 96.0' in text
    # Who is counted with others sees nothing: the sum is not its own.
    assert b"tenant=" not in generate_latest(metrics.view("tenant-7"))
    assert b"tenant=" not in generate_latest(metrics.view(""))


def test_times_to_first_token_are_a_histogram():
    metrics = TenantMetrics()
    for seconds in (0.05, 0.051, 99.0):
        metrics.of("north").first_token(seconds)
    text = generate_latest(metrics).decode()
    name = "strongroom_tenant_time_to_first_token_seconds"
    assert f'{name}_bucket{{le="0.05",tenant="north"}} 1.0' in text
    assert f'{name}_bucket{{le="0.1",tenant="north"}} 2.0' in text
    assert f'{name}_bucket{{le="30.0",tenant="north"}} 2.0' in text
    assert f'{name}_bucket{{le="+Inf",tenant="north"}} 3.0' in text
    assert f'{name}_count{{tenant="north"}} 3.0' in text
    assert f'{name}_sum{{tenant="north"}} 99.101' in text


def test_a_caller_nobody_knows_is_in_the_sums_only():
    metrics = Metrics()
    call: Any = SimpleNamespace(route="/v1/chat/completions", model_id="", principal=None, outcome=finished("denied"))
    metrics.finished(call, 401, 0.1)
    assert b'strongroom_requests_total{model="",outcome="denied"' in metrics.text()
    assert b"tenant=" not in metrics.text()


def test_several_engines_make_one_exposition():
    """No metric is declared twice, and nothing that names no model stands there twice with two values."""

    def engine(model, running):
        registry = CollectorRegistry()
        Gauge("vllm:num_requests_running", "Running.", ("model_name",), registry=registry).labels(model).set(running)
        Histogram("vllm:ttft_seconds", "Times.", ("model_name",), registry=registry).labels(model).observe(running)
        Gauge("process_open_fds", "Of the process.", registry=registry).set(running)
        return generate_latest(registry).decode()

    text = merge_engines([engine("a", 1), engine("b", 2)]).decode()
    families = list(text_string_to_metric_families(text))
    assert [family.name for family in families] == [
        "vllm:num_requests_running",
        "vllm:ttft_seconds",
        "vllm:ttft_seconds_created",
    ]
    assert {sample.labels["model_name"]: sample.value for sample in families[0].samples} == {"a": 1.0, "b": 2.0}
    declared = re.findall(r"^# TYPE (\S+)", text, re.M)
    assert len(declared) == len(set(declared)) == 3
    assert "process_" not in text
    assert merge_engines([]) == b""


def test_the_specification_names_every_metric():
    rows = re.findall(
        r"^\| `(strongroom_[a-z_]+)` \| (\w+) \| (.*?) \|", Path("docs/specs/metrics.md").read_text(), re.M
    )
    documented = {(name.removesuffix("_total"), kind) for name, kind, _ in rows}
    known = {(family.name, family.type) for family in Metrics().registry.collect()}
    assert documented == known
