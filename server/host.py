"""The parent of all processes: starts audit writer, gateway and engines in order, hands keys over, stops them again."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import ssl
import sys
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import TYPE_CHECKING, Any

from server.audit.client import SyncAuditClient
from server.audit.entry import new_entry
from server.bootstrap import KMS_KEY, SIGNING_KEY, prepare_clients, prepare_embedded, prepare_folders, prepare_secrets
from server.engine.child import ChildEvent, ChildSpec, Handover, RestartPolicy
from server.engine.config import EngineConfig, refuse_weakening
from server.engine.local import local_engine_spec
from server.engine.supervisor import Supervisor
from server.errors import AuditUnavailableError, ConfigError, SealError
from server.gateway import bind
from server.registry.source import ModelSource, open_model
from server.sealed.agent import MODEL_REFUSED, KeyAgent
from server.sealed.kms.uri import open_kms
from server.sealed.signature import TrustedSigner, public_path
from server.store.database import Store

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.settings import ExportSettings, ModelSettings, Settings

log = logging.getLogger("strongroom.host")

_EVENTS = {
    ChildEvent.READY: "started",
    ChildEvent.EXITED: "died",
    ChildEvent.UNHEALTHY: "unhealthy",
    ChildEvent.GAVE_UP: "given-up",
    ChildEvent.STOPPED: "stopped",
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
        _check_ports(settings)
        prepare_folders(settings.state)
        prepare_secrets(settings)
        if embedded:
            prepare_embedded(settings, self.say)
            trusted = (public_path(settings.keys_dir / SIGNING_KEY), *settings.seal.trusted_signers)
            kms = (f"file:{settings.keys_dir / KMS_KEY}", *settings.seal.kms)
            seal = settings.seal.model_copy(update={"trusted_signers": trusted, "kms": kms})
            settings = self.settings = settings.model_copy(update={"seal": seal})
        sources = self._open_models()
        exports = [self._export_spec(number, export) for number, export in enumerate(settings.audit.exports, 1)]
        engines = [self._engine_spec(model, source) for model, source in sources]
        specs = (self._writer_spec(), *exports, self._gateway_spec(), *engines)
        supervisor = Supervisor(specs, self._on_event)
        supervisor.handle_signals()
        await supervisor.start(self._progress)
        await asyncio.to_thread(self._record, "supervisor:server:started", models=len(settings.models))
        banner()
        asked = await supervisor.run()
        self.say("stopped" if asked else "stopped: a process that is needed could not be kept running; see STATE/logs")
        return 0 if asked else 1

    def _open_models(self) -> list[tuple[ModelSettings, ModelSource]]:
        store = Store.open(self.settings.store_url)
        try:
            return [
                (model, open_model(model, self.settings.seal, floor=store.get_floor(model.id)))
                for model in self.settings.models
                if model.engine.kind == "vllm"
            ]
        finally:
            store.close()

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
            str(settings.keys_dir / "audit.key"),
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
            env=_environment(),
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

        async def ready() -> bool:  # a receiver that is down must not keep the server from starting: entries wait
            return True

        return ChildSpec(
            name=f"audit export {number}",
            argv=tuple(argv),
            env=_environment(),
            ready=ready,
            log_path=settings.state / "logs" / f"audit-export-{number}.log",
            critical=False,
        )

    def _gateway_spec(self) -> ChildSpec:
        settings = self.settings
        resolved = settings.state / "run-settings.json"
        argv = (sys.executable, "-m", "server.gateway", "--settings", str(resolved))

        async def before_start() -> Handover | None:
            resolved.unlink(missing_ok=True)
            resolved.touch(mode=0o600)
            resolved.write_text(settings.model_dump_json(), encoding="utf-8")
            await asyncio.to_thread(prepare_clients, settings, self._record)
            return None

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

    def _engine_spec(self, model: ModelSettings, source: ModelSource) -> ChildSpec:
        settings = self.settings
        engine = model.engine
        config = EngineConfig(
            model_id=model.id,
            path=model.path,
            max_model_len=engine.max_model_len or source.max_model_len,
            task="embed" if engine.runner == "pooling" else "generate",
            dtype=engine.dtype,
            quantization=engine.quantization,
            kv_cache_gb=engine.kv_cache_gib,
            cpu_cores=_parse_cores(engine.cpu_cores),
            prefix_caching=engine.prefix_caching,
            ngram_tokens=engine.speculative_ngram,
            enforce_eager=engine.enforce_eager,
            tensor_parallel_size=engine.tensor_parallel_size,
            gpu_memory_utilization=engine.gpu_memory_utilization,
            max_num_seqs=engine.max_num_seqs,
            tool_parser=engine.tool_parser,
            reasoning_parser=engine.reasoning_parser,
            manifest_sha256=source.manifest_digest,
            ban_control_tokens=engine.ban_control_tokens,
            keep_control_tokens=engine.keep_control_tokens,
            device_open=engine.device_open,
            extra_args=dict(engine.extra_args),
            network_isolation=settings.seal.network_isolation,
        )
        refusals: list[str] = []

        def record(event: str, /, **fields: Any) -> None:
            self._record(event, **fields)
            if event == MODEL_REFUSED:
                refusals.append(str(fields.get("detail", "")))

        agent = KeyAgent(
            services=[open_kms(uri) for uri in settings.seal.kms],
            trusted_signers=[TrustedSigner.load(path) for path in settings.seal.trusted_signers],
            record=record,
            allow_unsigned=settings.seal.allow_unsigned,
        )

        def release() -> Handover:
            if refusals:  # the loader found damage: another start would only ask for the key again
                raise SealError(refusals[-1], kind="payload")
            store = Store.open(settings.store_url)
            try:
                floor = store.get_floor(model.id)
            finally:
                store.close()
            released = agent.release(model.path, floor=floor)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            agent.serve(ours, released, num_workers=engine.tensor_parallel_size)
            descriptor = theirs.detach()
            return Handover({"STRONGROOM_KEY_FD": str(descriptor)}, (descriptor,))

        async def hand_over() -> Handover:
            return await asyncio.to_thread(release)

        return local_engine_spec(
            config, settings.state, os.environ, hand_over=hand_over, ready_limit_s=engine.start_timeout_s
        )

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
        name = _EVENTS.get(event)
        if name is None or child.startswith("audit "):  # the writer tells of itself, exports of their delays
            return
        kind, _, model = child.partition(" ")
        asyncio.get_running_loop().run_in_executor(None, self._record_child, f"supervisor:{kind}:{name}", model, detail)

    def _record_child(self, event: str, model: str, detail: dict[str, Any]) -> None:
        try:
            self._record(event, model=model, **{key: str(value) for key, value in detail.items()})
        except AuditUnavailableError as err:
            log.error("an event could not be put on record: %s", err)  # noqa: TRY400 - the message is all there is

    def _progress(self, child: str, seconds: float) -> None:
        whole = int(seconds)
        if whole and whole % 5 == 0 and seconds - whole < 0.1:
            self.say(f"waiting for the {child} ({whole} s)")


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


def _parse_cores(text: str | None) -> tuple[int, ...]:
    """Return core numbers from `0-3,8`.

    Raises:
        ConfigError: It is something else.
    """
    if not text:
        return ()
    cores: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            cores += range(int(first), int(last or first) + 1)
    except ValueError as err:
        raise ConfigError(f"engine.cpu_cores: {text!r} is not a list of cores such as '0-3,8'.") from err
    return tuple(cores)


def is_ready(settings: Settings) -> bool:
    """Whether all models answer."""
    return answers(settings, "/readyz")
