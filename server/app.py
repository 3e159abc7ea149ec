"""The composition root of the gateway: builds every room from the settings and wires them, once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.api.access import Access
from server.api.admin import AdminDeps, build_admin
from server.api.admin_identity import IdentityDeps, identity_router
from server.api.exchange import Traffic
from server.api.public import PublicDeps, build_public
from server.api.stored import StoredResponses
from server.audit.client import AuditClient
from server.audit.entry import new_entry
from server.audit.receipts import Receipts
from server.audit.record import Audit
from server.audit.tags import Event
from server.audit.texts import TenantKeys, TextStore
from server.auth.api_key import KeyRing
from server.auth.authenticator import Authenticator
from server.auth.jwks import ProviderKeys
from server.auth.mtls import CertificateMap, CertificateRules
from server.auth.oidc import ClaimRules, OIDCVerifier
from server.auth.pepper import CacheSalt, load_pepper, load_secret
from server.auth.throttle import FailureThrottle, keyless_throttle, report_suppressed
from server.engine.client import EngineClient, unix_address, url_address
from server.engine.local import engine_paths
from server.errors import AuditUnavailableError, ConfigError
from server.follow import follow
from server.guard.deeper import DeeperScanner
from server.guard.guard import Guard
from server.guard.secrets import without_secrets
from server.obs.metrics import Metrics, merge_engines
from server.pipeline import Pipeline
from server.policy.budget import LimitedUse, UsageBook
from server.policy.engine import ModelFacts, PolicyEngine
from server.policy.fairness import Fairness
from server.policy.limit_file import load_limits
from server.policy.limits_in_force import LimitsInForce
from server.policy.rate import DAY_S, MemoryLedger
from server.policy.shared_ledger import SharedLedger
from server.registry.adapters import adapter_digest, settings_of, verify_adapters
from server.registry.served import ModelRegistry, ServedModel
from server.registry.source import open_model
from server.sealed.stage import take_handed_files
from server.store.database import Store
from server.store.floors import Floors
from server.store.incidents import Quarantine
from server.store.responses import ResponseStore
from server.store.watch import StoreWatch
from server.template.chat_template import load_source
from server.template.prompt import PromptBuilder
from server.template.registry import TemplateRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from pathlib import Path

    from starlette.types import ASGIApp

    from server.sealed.stage import OpenedFiles
    from server.settings import GuardSettings, ModelSettings, Settings

log = logging.getLogger("strongroom.gateway")

_SCANNER_REPORT_S = 5.0


@dataclass(slots=True)
class Gateway:
    """The gateway's two applications and what runs beside them."""

    settings: Settings
    public: ASGIApp
    admin: ASGIApp
    traffic: Traffic
    metrics: Metrics
    models: ModelRegistry
    engines: tuple[EngineClient, ...]
    audit: AuditClient
    store: Store
    watch: StoreWatch
    usage: UsageBook
    guard: Guard
    ledger: MemoryLedger | SharedLedger
    limits: LimitsInForce
    policy: PolicyEngine
    throttles: Mapping[str, FailureThrottle]
    templates: TemplateRegistry
    record: Callable[..., Coroutine[Any, Any, int]]
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> None:
        """Start what runs in the background: engine watches, the store's watch, the usage book, the scan workers."""
        self.watch.start()
        self.usage.start(self.store)
        await self.guard.warm()
        for engine in self.engines:
            self._tasks.append(asyncio.create_task(engine.watch(on_change=self._watcher(engine))))
        self._tasks.append(asyncio.create_task(follow(self.policy, Event.POLICY_CHANGED, self.record)))
        self._tasks.append(asyncio.create_task(report_suppressed(self.throttles, self.record)))
        self._tasks.append(asyncio.create_task(_report_scanner(self.guard, self.record)))
        self._tasks.append(asyncio.create_task(self.guard.run_deeper(self.record)))
        self._tasks.append(asyncio.create_task(follow(self.templates, Event.TEMPLATE_CHANGED, self.record)))
        await self.limits.adopt(self.limits.current)
        self._tasks.append(asyncio.create_task(follow(self.limits, Event.BUDGET_CHANGED, self.record)))
        await self._say_what_is_in_force()

    async def _say_what_is_in_force(self) -> None:
        try:
            await self.record(
                Event.GATEWAY_CONFIGURED,
                policy=self.policy.current.digest,
                templates=self.templates.current.digest,
                models=[{"id": model.id, "digest": model.digest} for model in self.models.models],
            )
        except AuditUnavailableError as err:  # requests are refused for the same reason until the writer is back
            log.error("the start could not be put on record: %s", err)  # noqa: TRY400 - the message is all there is

    async def stop(self) -> None:
        """Stop it again; nothing is lost that was counted."""
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if isinstance(self.ledger, SharedLedger):
            await self.ledger.close()
        self.watch.stop()
        self.usage.stop(self.store)
        await self.guard.close()
        for engine in self.engines:
            engine.close()
        await self.audit.aclose()
        self.store.close()

    def _watcher(self, engine: EngineClient) -> Callable[[bool, str | None], None]:
        gauge = self.metrics.engine_ready.labels(engine.model)

        def on_change(ready: bool, refusal: str | None) -> None:
            gauge.set(1 if ready else 0)
            log.info("engine is %s", "ready" if ready else "down", extra={"model": engine.model, "refusal": refusal})

        return on_change


def build_gateway(settings: Settings) -> Gateway:
    """Build the gateway; nothing listens yet.

    Raises:
        StartError: A policy, template, key or model is missing or wrong, by name.
    """
    metrics = Metrics()
    store = Store.open(settings.store_url)
    quarantine = Quarantine()
    pepper = load_pepper(settings.keys_dir / "pepper")
    ring = KeyRing(pepper)
    watch = StoreWatch(store, quarantine=quarantine, on_keys=ring.load, used=ring.take_used)
    watch.poll()
    throttle, keyless = FailureThrottle(), keyless_throttle()
    auth = Authenticator(
        ring,
        throttle=throttle,
        keyless=keyless,
        quarantine=quarantine,
        store_age_s=watch.age_s,
        tokens=_token_verifier(settings),
        certificates=_certificate_map(settings),
    )
    salt = CacheSalt(load_secret(settings.keys_dir / "cache-salt", "cache salt"))
    templates = TemplateRegistry.load(
        settings.templates.directory,
        settings.templates.directory / "templates.lock",
        require_signature=settings.templates.require_signature,
        public_key=settings.templates.signer.read_bytes() if settings.templates.signer else None,
    )
    opened = take_handed_files()
    served = [
        one
        for model in settings.models
        for one in _serve_model(model, settings, store, templates, salt, opened.get(model.id))
    ]
    models = ModelRegistry(tuple(model for model, _ in served))
    engines = tuple(engine for _, engine in served)
    with_engines = {model.id for model in settings.models}  # an adapter's engine is its model's, and counted there
    own_engines = tuple(engine for engine in engines if engine.model in with_engines)
    metrics.unsigned_models.set(sum(not model.signed for model in models.models))
    bases = {adapter.id: model.id for model in settings.models for adapter in model.adapters}
    facts = {
        model.id: ModelFacts(
            model.settings.stage, model.settings.classification, model.settings.licence, bases.get(model.id, "")
        )
        for model in models.models
    }
    policy = PolicyEngine.load(settings.policy.directory, models=facts.get, quarantine=quarantine)
    appender = AuditClient(settings.audit_socket, answer_s=settings.audit.append_timeout_s)
    text_key = load_secret(settings.keys_dir / "audit-text", "audit text key")
    tenant_keys = TenantKeys(settings.state / "texts" / "keys", text_key)
    texts = TextStore(settings.state / "texts", tenant_keys, redact=without_secrets)
    audit = Audit(appender, text_key=text_key, tenant_keys=tenant_keys, texts=texts)
    guard = Guard(
        num_workers=settings.guard.num_workers,
        timeout_s=settings.guard.scan_timeout_ms / 1000,
        rules=_guard_folder(settings.guard),
        deeper=_deeper(settings.guard),
    )
    limits_file = settings.limits.file or settings.policy.directory / "limits.yaml"
    book = load_limits(limits_file)
    usage = UsageBook()
    ledger = SharedLedger(settings.limits.redis_url, book) if settings.limits.redis_url else MemoryLedger(book)
    limits = LimitedUse(
        book,
        ledger=ledger,
        usage=usage,
        engines=_queues(settings, settings.limits.max_running),
        completions=_queues(settings, settings.limits.max_completions),
    )
    pipeline = Pipeline(audit=audit, auth=auth, models=models, policy=policy, guard=guard, limits=limits)
    traffic = Traffic(pipeline, settings.public, metrics)

    async def record(event: str, **fields: Any) -> int:
        return await audit.append(new_entry(event, **fields))

    access = Access(auth, policy, record, limits)
    ready = lambda: all(model.engine.ready for model in models.models if not model.settings.optional)  # noqa: E731
    public = build_public(
        PublicDeps(
            traffic=traffic,
            models=models,
            access=access,
            guard=guard,
            receipts=Receipts(settings.audit_dir),
            stored=StoredResponses(
                ResponseStore(store, tenant_keys.get, keep_s=settings.responses.keep_days * DAY_S), access
            ),
            ready=ready,
            cors_origins=settings.public.cors_origins,
        )
    )
    admin = build_admin(
        AdminDeps(
            access=access,
            models=models,
            guard=guard,
            listener=settings.admin,
            metrics=lambda: _metrics_text(metrics, own_engines, audit, appender, settings.audit_dir),
            tenant_metrics=metrics.text_for,
            ready=lambda: {"models": {model.id: model.engine.ready for model in models.models}},
            routers=(
                identity_router(
                    IdentityDeps(
                        access,
                        policy,
                        store,
                        pepper,
                        watch,
                        record,
                        settings.admin,
                        model_id=models.id_of,
                        templates=lambda: templates.templates,
                    )
                ),
            ),
        )
    )
    in_force = LimitsInForce(limits, limits_file, store)
    if isinstance(ledger, SharedLedger):
        ledger.refill = lambda: in_force.adopt(in_force.current)
    return Gateway(
        settings=settings,
        public=public,
        admin=admin,
        traffic=traffic,
        metrics=metrics,
        models=models,
        engines=engines,
        audit=appender,
        store=store,
        watch=watch,
        usage=usage,
        guard=guard,
        ledger=ledger,
        limits=in_force,
        policy=policy,
        throttles={"throttled": throttle, "throttled, no credential": keyless},
        templates=templates,
        record=record,
    )


def _token_verifier(settings: Settings) -> OIDCVerifier | None:
    """Return the verifier of the configured identity provider's access tokens."""
    if settings.oidc is None:
        return None
    rules = settings.oidc.model_dump(exclude={"issuer", "ca"})
    return OIDCVerifier(ProviderKeys(settings.oidc.issuer, ca=settings.oidc.ca), ClaimRules(**rules))


def _certificate_map(settings: Settings) -> CertificateMap | None:
    """Return who client certificates stand for, where the public listener asks for them."""
    tls = settings.public.tls
    if tls is None or tls.client_ca is None:
        return None
    return CertificateMap(CertificateRules(default_tenant=tls.default_tenant), revoked=tls.revoked)


def _serve_model(
    model: ModelSettings,
    settings: Settings,
    store: Store,
    templates: TemplateRegistry,
    salt: CacheSalt,
    opened: OpenedFiles | None,
) -> list[tuple[ServedModel, EngineClient]]:
    """Return a model and its adapters: one tokenizer and one engine, but names, stages and readiness of their own."""
    floor = Floors(store, settings.state).get(model.id)
    source = open_model(model, settings.seal, floor=floor, opened=opened)
    max_model_len = model.engine.max_model_len or source.max_model_len
    builder = PromptBuilder(
        templates,
        source.files,
        chat_template=load_source(model.chat_template) if model.chat_template else None,
        variables=settings.templates.variables,
        accept_shared_turn=model.accept_shared_turn,
        max_model_len=max_model_len,
        fim_family=model.fim,
        embeds=model.engine.runner == "pooling",
        messages=model.engine.prompts == "messages",
        end_ids=source.end_ids,
    )
    if model.engine.kind == "remote":
        address = url_address(model.engine.url or "", ca_file=model.engine.ca)
    else:
        address = unix_address(engine_paths(settings.state, model.id).socket)
    verify_adapters(model)
    names = [(model, source.digest)]
    names += [(settings_of(model, one), adapter_digest(source.digest, one)) for one in model.adapters]
    served = []
    for one, digest in names:
        engine = EngineClient(
            one.id,
            max_model_len,
            address,
            embeds=model.engine.runner == "pooling",
            messages=model.engine.prompts == "messages",
        )
        served.append(
            (
                ServedModel(
                    settings=one,
                    digest=digest,
                    signed=source.signer is not None,
                    engine=engine,
                    renderer=builder,
                    control_ids=frozenset(builder.vocabulary.control_ids),
                    cache_salt=salt.cache_salt,
                ),
                engine,
            )
        )
    return served


def _queues(settings: Settings, capacity: int) -> dict[str, Fairness]:
    """Return the places of each engine by the models that share it: a model and its adapters stand in one queue."""
    queues: dict[str, Fairness] = {}
    for model in settings.models:
        queue = Fairness(capacity)
        queues |= dict.fromkeys((model.id, *(adapter.id for adapter in model.adapters)), queue)
    return queues


def _guard_folder(settings: GuardSettings) -> Path:
    if not (settings.directory / "rules").is_dir():
        raise ConfigError(
            f"guard.directory is {settings.directory}, which has no folder 'rules': name the guard's folder."
        )
    return settings.directory


def _deeper(settings: GuardSettings) -> DeeperScanner | None:
    if settings.deeper is None:
        return None
    if not os.access(settings.deeper, os.X_OK):
        raise ConfigError(f"guard.deeper is {settings.deeper}, which can't be run: name the semgrep of an environment.")
    timeout_s = settings.deeper_timeout_ms / 1000
    return DeeperScanner(settings.deeper, timeout_s=timeout_s, rules=settings.directory / "semgrep")


async def _report_scanner(guard: Guard, record: Callable[..., Coroutine[Any, Any, int]]) -> None:
    """Put failures of the scanner on record, one entry an interval, until cancelled: clients can cause many."""
    while True:
        await asyncio.sleep(_SCANNER_REPORT_S)
        if failures := guard.take_failures():
            with contextlib.suppress(AuditUnavailableError):  # the log is down, and nothing else is answered either
                await record(Event.SCANNER_FAILED, **failures)


async def _metrics_text(
    metrics: Metrics, engines: tuple[EngineClient, ...], audit: Audit, appender: AuditClient, audit_dir: Path
) -> bytes:
    """Return our metrics, then each engine's own; one that is down is left out, `strongroom_engine_ready` says so."""
    metrics.audit_writable.set(audit.is_writable and await appender.is_available())
    with contextlib.suppress(FileNotFoundError):
        metrics.audit_cosigned.set((audit_dir / "cosignatures").stat().st_mtime)
    texts = []
    for engine in engines:
        if engine.ready:
            with contextlib.suppress(Exception):
                texts.append(await engine.metrics_text())
    return metrics.text() + merge_engines(texts)
