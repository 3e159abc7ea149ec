"""Typed settings: one YAML file, parsed and validated once, then frozen.

Every setting stands with its default and meaning in `configs/strongroom.yaml`; `tests/docs` holds the two together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.errors import ConfigError
from server.folders import make_runtime_dir

RUN_SETTINGS_NAME: Final = "run-settings.json"
"""In the state folder: the settings that the server last ran with, resolved, for the gateway and for commands."""


class _Section(BaseModel):
    """A frozen section; an unknown field is an error that names it."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class TLSSettings(_Section):
    """TLS of a listener; client certificates where `client_ca` is set."""

    certificate: Path
    key: Path
    client_ca: Path | None = None
    revoked: Path | None = None
    require_client_certificate: bool = False
    default_tenant: str | None = None


class ListenerSettings(_Section):
    """Where a listener binds, and how long it bears with a slow client."""

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    tls: TLSSettings | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = Field(default=8 * 1024 * 1024, ge=1024)
    max_header_bytes: int = Field(default=32 * 1024, ge=1024)
    header_timeout_s: float = Field(default=10.0, gt=0)
    body_timeout_s: float = Field(default=30.0, gt=0)
    write_timeout_s: float = Field(default=60.0, gt=0)
    heartbeat_s: float = Field(default=10.0, ge=1)
    drain_s: float = Field(default=20.0, ge=0)
    max_connections: int = Field(default=4096, ge=1)


class OIDCSettings(_Section):
    """One identity provider whose access tokens are accepted; see docs/identity.md."""

    issuer: str
    audience: str
    ca: Path | None = None
    algorithms: frozenset[str] = frozenset({"ES256", "RS256", "EdDSA"})
    token_types: frozenset[str] = frozenset({"at+jwt", "application/at+jwt"})
    subject_claim: str = "sub"
    tenant_claim: str = "tenant"
    default_tenant: str | None = None
    groups_claim: str = "groups"
    group_map: dict[str, str] = Field(default_factory=dict)
    scope_claim: str = "scope"
    scope_map: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    leeway_s: float = 60.0


class EngineSettings(_Section):
    """How vLLM runs for one model; the fields are vLLM's own terms."""

    kind: Literal["vllm", "remote"] = "vllm"
    url: str | None = None
    ca: Path | None = None
    prompts: Literal["ids", "messages"] = "ids"
    runner: Literal["generate", "pooling"] = "generate"
    pooling: Literal["mean", "cls", "last"] | None = None
    max_model_len: int | None = Field(default=None, ge=16)
    dtype: str = "auto"
    quantization: str | None = None
    kv_cache_gib: int = Field(default=1, ge=1)
    cpu_cores: str | None = None
    tensor_parallel_size: int = Field(default=1, ge=1)
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    enforce_eager: bool = False
    prefix_caching: bool = True
    speculative_ngram: int = Field(default=0, ge=0, le=16)
    max_num_seqs: int | None = Field(default=None, ge=1)
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    ban_control_tokens: bool = False
    keep_control_tokens: tuple[str, ...] = ()
    device_open: Literal["auto", "interpret", "off"] = "auto"
    extra_args: dict[str, str | None] = Field(default_factory=dict)
    start_timeout_s: float = Field(default=900.0, gt=0)


class AdapterSettings(_Section):
    """One LoRA adapter of a model, served as a model of its own by the same engine."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,95}$")
    path: Path | None = None
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    aliases: tuple[str, ...] = ()
    stage: Literal["candidate", "canary", "live"] = "live"


class ModelSettings(_Section):
    """One model behind the address: which sealed folder, under which names, on which engine."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,95}$")
    path: Path
    aliases: tuple[str, ...] = ()
    stage: Literal["candidate", "canary", "live"] = "live"
    classification: str = "internal"
    licence: str = "unknown"
    fim: str | None = None
    chat_template: Path | None = None
    accept_shared_turn: bool = False
    optional: bool = False
    adapters: tuple[AdapterSettings, ...] = ()
    engine: EngineSettings = EngineSettings()


class SealSettings(_Section):
    """What a sealed model must prove before its key is asked for."""

    kms: tuple[str, ...] = ()
    trusted_signers: tuple[Path, ...] = ()
    allow_unsigned: bool = False
    network_isolation: Literal["require", "auto", "off"] = "auto"


class PolicySettings(_Section):
    """Where the Cedar policy set lies."""

    directory: Path = Path("policy")


class TemplateSettings(_Section):
    """Where the security templates lie; the lock is `templates.lock` in the same folder."""

    directory: Path = Path("templates")
    require_signature: bool = False
    signer: Path | None = None
    variables: dict[str, bool | int | str] = Field(default_factory=dict)


class GuardSettings(_Section):
    """The scanners' workers and rules."""

    directory: Path = Path("guard")
    num_workers: int = Field(default=1, ge=1, le=64)
    scan_timeout_ms: int = Field(default=2000, ge=1)
    deeper: Path | None = None
    deeper_timeout_ms: int = Field(default=60_000, ge=1000)


class ExportSettings(_Section):
    """One receiver of the audit log; a process of its own ships to it and keeps its place across restarts."""

    to: str
    format: Literal["json", "cef", "ocsf"] = "json"
    ca: Path | None = None
    certificate: Path | None = None


class WitnessSettings(_Section):
    """One witness on another host, which is asked to cosign the log's checkpoints."""

    url: str = Field(pattern=r"https?://.+")
    key: str


class AuditSettings(_Section):
    """The log's name and pace."""

    origin: str = "strongroom.local/audit"
    key: str | None = Field(default=None, pattern=r"pkcs11:.+")
    heartbeat_s: float = Field(default=60.0, gt=0)
    append_timeout_s: float = Field(default=10.0, gt=0)
    exports: tuple[ExportSettings, ...] = ()
    witnesses: tuple[WitnessSettings, ...] = ()
    witness_ca: Path | None = None
    witness_interval_s: float = Field(default=60.0, gt=0)


class LimitSettings(_Section):
    """What belongs to the machine; limits and prices stand in the policy folder's `limits.yaml`."""

    max_running: int = Field(default=256, ge=1)
    max_completions: int = Field(default=64, ge=1)
    file: Path | None = None
    redis_url: str | None = None


class ResponseSettings(_Section):
    """Stored responses; whose are stored at all is policy's to say (`@store_responses`)."""

    keep_days: int = Field(default=30, ge=1, le=3650)


class StoreSettings(_Section):
    """Control data: keys, floors, budgets. The default is SQLite in the state folder."""

    url: str | None = None


class Settings(_Section):
    """Everything the operator sets."""

    state: Path = Path(".strongroom")
    public: ListenerSettings = ListenerSettings()
    admin: ListenerSettings = ListenerSettings(port=8001)
    models: tuple[ModelSettings, ...] = ()
    seal: SealSettings = SealSettings()
    oidc: OIDCSettings | None = None
    policy: PolicySettings = PolicySettings()
    templates: TemplateSettings = TemplateSettings()
    guard: GuardSettings = GuardSettings()
    audit: AuditSettings = AuditSettings()
    limits: LimitSettings = LimitSettings()
    store: StoreSettings = StoreSettings()
    responses: ResponseSettings = ResponseSettings()
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def keys_dir(self) -> Path:
        """Where the server's own secrets lie."""
        return self.state / "keys"

    @property
    def audit_dir(self) -> Path:
        """The audit log's folder."""
        return self.state / "audit"

    @property
    def store_url(self) -> str:
        """SQLAlchemy URL of the store."""
        return self.store.url or f"sqlite:///{self.state / 'store.db'}"

    @property
    def audit_socket(self) -> Path:
        """Where the audit writer listens."""
        return make_runtime_dir(self.state) / "audit.sock"


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys."""


def _no_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: {key!r} is set twice; keep one.")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def load_settings(path: Path, overrides: dict[str, Any] | None = None) -> Settings:
    """Read and validate the configuration.

    Folders of policy, templates and guard rules are taken relative to the file's own folder; model folders relative to
    the state folder; everything else relative to the working directory.

    Args:
        path: The YAML file.
        overrides: Settings by dotted name (`public.port`) that win over the file, from the command line.

    Raises:
        ConfigError: The file is missing or a setting is wrong, by name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"The configuration {path} can't be read: {err.strerror}.") from err
    try:
        # A SafeLoader subclass: no object construction, see _StrictLoader.
        raw = yaml.load(text, Loader=_StrictLoader) or {}  # noqa: S506
    except yaml.YAMLError as err:
        raise ConfigError(f"{path} is not valid YAML: {err}") from err
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold settings by name, not a {type(raw).__name__}.")
    for name, value in (overrides or {}).items():
        section = raw
        *parents, last = name.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return parse_settings(raw, base=path.resolve().parent)


def parse_settings(raw: dict[str, Any], *, base: Path) -> Settings:
    """Validate settings already read; `base` is the folder that relative rule folders start from.

    Raises:
        ConfigError: A setting is unknown or wrong, by name.
    """
    try:
        settings = Settings.model_validate(raw)
    except ValidationError as err:
        first = err.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"Setting {name!r}: {first['msg']}. See configs/strongroom.yaml for every setting.") from err
    if settings.admin.tls is not None and settings.admin.tls.revoked is not None:
        raise ConfigError(
            "Setting 'admin.tls.revoked' would not be read: certificates stand for nobody there. Unset it."
        )
    state = settings.state.expanduser().absolute()
    models = tuple(_place_model(model, state) for model in settings.models)
    names = [name for model in models for name in (model.id, *model.aliases)]
    names += [name for model in models for adapter in model.adapters for name in (adapter.id, *adapter.aliases)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two models answer to the name {name!r}; ids and aliases must differ.")
    for model in models:
        engine = model.engine
        if engine.prompts == "messages" and (engine.kind != "remote" or engine.runner != "generate"):
            raise ConfigError(
                f"Model {model.id!r}: 'prompts: messages' is for remote engines that generate text; ours take ids."
            )
    return settings.model_copy(
        update={
            "state": state,
            "models": models,
            "policy": settings.policy.model_copy(update={"directory": _under(base, settings.policy.directory)}),
            "guard": settings.guard.model_copy(update={"directory": _under(base, settings.guard.directory)}),
            "templates": settings.templates.model_copy(
                update={"directory": _under(base, settings.templates.directory)}
            ),
        }
    )


def _place_model(model: ModelSettings, state: Path) -> ModelSettings:
    """Return the model with its folders below the state folder.

    Raises:
        ConfigError: An adapter of a local engine has no folder.
    """
    for adapter in model.adapters:
        if adapter.path is None and model.engine.kind == "vllm":
            raise ConfigError(f"The adapter {adapter.id!r} of an engine on this machine needs a path.")
    adapters = tuple(
        adapter if adapter.path is None else adapter.model_copy(update={"path": _under(state, adapter.path)})
        for adapter in model.adapters
    )
    return model.model_copy(update={"path": _under(state, model.path), "adapters": adapters})


def _under(base: Path, path: Path) -> Path:
    return path if path.is_absolute() else base / path


def find_store_url(state: Path, named: str | None = None) -> str:
    """Return the address of the store that the server of a state folder uses, for a command beside it.

    A command must not take an empty store of its own for the server's: it would find no floor and no key there.

    Args:
        state: The state folder.
        named: The address, where the caller was given it.

    Raises:
        ConfigError: The server's own note of its settings is damaged.
    """
    if named is not None:
        return named
    note = state / RUN_SETTINGS_NAME
    try:
        return parse_settings(json.loads(note.read_text(encoding="utf-8")), base=Path("/")).store_url
    except FileNotFoundError:
        return Settings(state=state).store_url  # not started yet: nobody has named another
    except (OSError, ValueError) as err:
        raise ConfigError(f"{note} can't be read ({type(err).__name__}); start the server, or use --store.") from err
