"""The composition root of the gateway: builds every room from the settings and wires them, once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from server.api.access import Access
from server.api.admin import AdminDeps, build_admin
from server.api.admin_identity import IdentityDeps, identity_router
from server.api.exchange import Traffic
from server.api.public import PublicDeps, build_public
from server.audit.client import AuditClient
from server.audit.entry import new_entry
from server.audit.receipts import Receipts
from server.audit.record import Audit
from server.audit.texts import TenantKeys, TextStore
from server.auth.api_key import KeyRing
from server.auth.authenticator import Authenticator
from server.auth.jwks import ProviderKeys
from server.auth.mtls import CertificateMap, CertificateRules
from server.auth.oidc import ClaimRules, OIDCVerifier
from server.auth.pepper import CacheSalt, load_pepper, load_secret
from server.auth.throttle import FailureThrottle, report_suppressed
from server.engine.client import EngineClient, unix_address, url_address
from server.engine.local import engine_paths
from server.guard.guard import Guard
from server.guard.secrets import without_secrets
from server.obs.metrics import Metrics
from server.pipeline import Pipeline
from server.policy.budget import LimitedUse, UsageBook, sum_used
from server.policy.engine import ModelFacts, PolicyEngine
from server.policy.fairness import Fairness
from server.policy.follow import follow_policies
from server.policy.limit_file import load_limits
from server.policy.rate import MemoryLedger
from server.policy.shared_ledger import SharedLedger
from server.registry.served import ModelRegistry, ServedModel
from server.registry.source import open_model
from server.store.database import Store
from server.store.incidents import Quarantine
from server.store.watch import StoreWatch
from server.template.chat_template import load_source
from server.template.follow import follow_templates
from server.template.prompt import PromptBuilder
from server.template.registry import TemplateRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.types import ASGIApp

    from server.settings import ModelSettings, Settings

log = logging.getLogger("strongroom.gateway")


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
    policy: PolicyEngine
    throttle: FailureThrottle
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
        self._tasks.append(asyncio.create_task(follow_policies(self.policy, self.record)))
        self._tasks.append(asyncio.create_task(report_suppressed(self.throttle, self.record)))
        self._tasks.append(asyncio.create_task(follow_templates(self.templates, self.record)))
        totals = list(sum_used(self.store, time.time()))
        if isinstance(self.ledger, SharedLedger):
            await self.ledger.seed(totals)
        else:
            self.ledger.load(totals)

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
    throttle = FailureThrottle()
    auth = Authenticator(
        ring,
        throttle=throttle,
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
    served = [_serve_model(model, settings, store, templates, salt) for model in settings.models]
    models = ModelRegistry(tuple(model for model, _ in served))
    engines = tuple(engine for _, engine in served)
    metrics.unsigned_models.set(sum(not model.signed for model in models.models))
    facts = {
        model.id: ModelFacts(model.settings.stage, model.settings.classification, model.settings.licence)
        for model in models.models
    }
    policy = PolicyEngine.load(settings.policy.directory, models=facts.get, quarantine=quarantine)
    appender = AuditClient(settings.audit_socket, answer_s=settings.audit.append_timeout_s)
    text_key = load_secret(settings.keys_dir / "audit-text", "audit text key")
    tenant_keys = TenantKeys(settings.state / "texts" / "keys", text_key)
    texts = TextStore(settings.state / "texts", tenant_keys, redact=without_secrets)
    audit = Audit(appender, text_key=text_key, tenant_keys=tenant_keys, texts=texts)
    guard = Guard(num_workers=settings.guard.num_workers, timeout_s=settings.guard.scan_timeout_ms / 1000)
    book = load_limits(settings.limits.file or settings.policy.directory / "limits.yaml")
    usage = UsageBook()
    ledger = SharedLedger(settings.limits.redis_url, book) if settings.limits.redis_url else MemoryLedger(book)
    limits = LimitedUse(
        book,
        ledger=ledger,
        usage=usage,
        engines={model.id: Fairness(settings.limits.max_running) for model in models.models},
    )
    pipeline = Pipeline(audit=audit, auth=auth, models=models, policy=policy, guard=guard, limits=limits)
    traffic = Traffic(pipeline, settings.public, metrics)

    async def record(event: str, **fields: Any) -> int:
        return await audit.append(new_entry(event, **fields))

    access = Access(auth, policy, record)
    ready = lambda: all(engine.ready for engine in engines)  # noqa: E731 - one use, one line
    public = build_public(
        PublicDeps(
            traffic=traffic,
            models=models,
            access=access,
            guard=guard,
            receipts=Receipts(settings.audit_dir),
            ready=ready,
            cors_origins=settings.public.cors_origins,
        )
    )
    admin = build_admin(
        AdminDeps(
            access=access,
            models=models,
            policy=policy,
            guard=guard,
            listener=settings.admin,
            metrics=lambda: _metrics_text(metrics, engines),
            ready=lambda: {"models": {model.id: model.engine.ready for model in models.models}},
            routers=(identity_router(IdentityDeps(access, policy, store, pepper, watch, record, settings.admin)),),
        )
    )
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
        policy=policy,
        throttle=throttle,
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
    model: ModelSettings, settings: Settings, store: Store, templates: TemplateRegistry, salt: CacheSalt
) -> tuple[ServedModel, EngineClient]:
    source = open_model(model, settings.seal, floor=store.get_floor(model.id))
    builder = PromptBuilder(
        templates,
        source.files,
        chat_template=load_source(model.chat_template) if model.chat_template else None,
        variables=settings.templates.variables,
        accept_shared_turn=model.accept_shared_turn,
        fim_family=model.fim,
        embeds=model.engine.runner == "pooling",
    )
    max_model_len = model.engine.max_model_len or source.max_model_len
    if model.engine.kind == "remote":
        address = url_address(model.engine.url or "", ca_file=model.engine.ca)
    else:
        address = unix_address(engine_paths(settings.state, model.id).socket)
    engine = EngineClient(model.id, max_model_len, address, embeds=model.engine.runner == "pooling")
    served = ServedModel(
        settings=model,
        digest=source.digest,
        signed=source.signer is not None,
        engine=engine,
        renderer=builder,
        control_ids=frozenset(builder.vocabulary.control_ids),
        cache_salt=salt.cache_salt,
    )
    return served, engine


async def _metrics_text(metrics: Metrics, engines: tuple[EngineClient, ...]) -> bytes:
    """Return our metrics, then each engine's own; one that is down is left out, `strongroom_engine_ready` says so."""
    pieces = [metrics.text()]
    for engine in engines:
        if engine.ready:
            with contextlib.suppress(Exception):
                pieces.append((await engine.metrics_text()).encode())
    return b"".join(pieces)
