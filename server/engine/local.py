"""An engine on this machine as a child of the supervisor: its folders, command, environment and checks in one value."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from server.engine.child import ChildSpec, Handover, RestartPolicy
from server.engine.client import EngineClient, unix_address
from server.engine.config import build_engine_argv, engine_environment
from server.errors import EngineError, EngineUnavailableError
from server.folders import make_private_dir, runtime_dir

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from pathlib import Path

    from server.engine.config import EngineConfig

STATUS_FILE = "isolation.json"
MAX_NAME_CHARS = 24


@dataclass(frozen=True, slots=True)
class EnginePaths:
    """Where one engine keeps what it needs while it runs; all in a folder with mode 0700."""

    socket: Path
    run_dir: Path
    log: Path


def engine_paths(state_dir: Path, model_id: str) -> EnginePaths:
    """Return the paths of a model's engine; short, since a socket's path has 107 bytes at most."""
    digest = hashlib.sha256(model_id.encode()).hexdigest()[:8]
    name = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in model_id)
    if name != model_id or len(name) > MAX_NAME_CHARS:  # two ids must never share a socket
        name = f"{name[:MAX_NAME_CHARS]}-{digest}"
    run = runtime_dir(state_dir)
    return EnginePaths(run / f"engine-{name}.sock", run / f"e-{digest}", state_dir / "logs" / f"engine-{name}.log")


def local_engine_spec(
    config: EngineConfig,
    state_dir: Path,
    environ: Mapping[str, str],
    *,
    hand_over: Callable[[], Awaitable[Handover]] | None = None,
    after_exit: Callable[[], Awaitable[None]] | None = None,
    ready_limit_s: float = 900.0,
    restart_policy: RestartPolicy | None = None,
) -> ChildSpec:
    """Return what the supervisor needs to run this engine.

    Args:
        config: The engine.
        state_dir: The state folder, absolute.
        environ: The parent's environment, from which a few harmless variables are taken.
        hand_over: Called before each start; verifies the sealed model, records the release, returns the key socket as
            `Handover({"STRONGROOM_KEY_FD": str(fd)}, (fd,))`. A `StartError` from it ends the attempts.
        after_exit: Called when the engine's tree is gone.
        ready_limit_s: How long it may take to load and pass its self-test.
        restart_policy: When it is started again.

    Raises:
        ConfigError: A setting, the environment or a path's length forbids the start.
    """
    paths = engine_paths(state_dir, config.model_id)
    argv = build_engine_argv(config, paths.socket)
    env = engine_environment(config, paths.run_dir, environ)
    client = EngineClient(
        config.model_id, config.max_model_len, unix_address(paths.socket), embeds=config.task == "embed"
    )

    async def before_start() -> Handover | None:
        client.close()
        _fresh_folders(paths)
        return await hand_over() if hand_over is not None else None

    async def ready() -> bool:
        try:
            await client.self_test()
        except (EngineUnavailableError, EngineError):
            return False
        return True

    return ChildSpec(
        name=f"engine {config.model_id}",
        argv=tuple(argv),
        env=env,
        ready=ready,
        healthy=client.health,
        restart_policy=restart_policy or RestartPolicy(initial_s=1.0, max_s=60.0, stable_s=300.0),
        ready_limit_s=ready_limit_s,
        grace_s=30.0,
        log_path=paths.log,
        discreet_log=True,
        before_start=before_start,
        after_exit=after_exit,
        critical=False,  # other models go on without this one, and the gateway says 503 for it
    )


def isolation_status(state_dir: Path, model_id: str) -> dict[str, Any]:
    """What isolation the running engine reached; empty if it has not come that far."""
    try:
        status = json.loads((engine_paths(state_dir, model_id).run_dir / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _fresh_folders(paths: EnginePaths) -> None:
    """Make the folders anew: vLLM leaves its sockets behind when it is killed."""
    make_private_dir(paths.run_dir.parent)
    make_private_dir(paths.log.parent)
    make_private_dir(paths.run_dir)
    shutil.rmtree(paths.run_dir)
    make_private_dir(paths.run_dir)
    paths.socket.unlink(missing_ok=True)
