"""What an engine's process runs: give up everything that is not needed, then become vLLM's API server.

    python -m server.engine.vllm.entry --network-isolation auto -- --model … --uds …

The supervisor starts it through `server/engine/launch.py`, in a session of its own and with the environment that
`engine_environment` made. multiprocessing runs this module again, as `__mp_main__` and before anything else, in each
process that vLLM spawns (EngineCore, Worker): there it only ties the process to its parent and forbids dumps.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

from server.engine.config import EXIT_REFUSED, refuse_weakening
from server.engine.isolation import die_with_parent, forbid_dumps, harden_spawned_process, isolate_network
from server.errors import ConfigError, StrongroomError

STATUS_FILE = "isolation.json"


def main(argv: list[str]) -> int:
    """Isolate this process, then serve until told to stop.

    Returns:
        The exit code; `EXIT_REFUSED` where the configuration is at fault.
    """
    parent_pid = os.getppid()
    os.umask(0o077)
    try:
        mode, args = _split(argv)
        refuse_weakening(args, os.environ)
        run_dir = _private_dir()
        socket_path = Path(args[args.index("--uds") + 1])
        report = isolate_network(mode)
        # After the namespace: the kernel lets only a dumpable process map its ids, and new credentials may cut the tie.
        forbid_dumps()
        die_with_parent(parent_pid)
    except (StrongroomError, ValueError, IndexError) as err:
        sys.stderr.write(f"engine refused to start: {err}\n")
        return EXIT_REFUSED
    status = {"network": report.achieved, "reason": report.reason, "dumpable": False, "core_limit_bytes": 0}
    (run_dir / STATUS_FILE).write_text(json.dumps(status), encoding="utf-8")
    socket_path.unlink(missing_ok=True)  # a killed engine leaves it behind, and vLLM would refuse to bind
    _serve(args)
    return 0


def _split(argv: list[str]) -> tuple[str, list[str]]:
    if len(argv) < 3 or argv[0] != "--network-isolation" or argv[2] != "--":
        raise ConfigError("expected: --network-isolation auto|require|off -- ARGUMENTS OF VLLM")
    return argv[1], argv[3:]


def _private_dir() -> Path:
    """The folder for vLLM's own sockets; it must be ours alone, or others could speak to EngineCore."""
    run_dir = Path(os.environ.get("VLLM_RPC_BASE_PATH", ""))
    info = run_dir.stat() if run_dir.is_dir() else None
    if info is None or info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise ConfigError("VLLM_RPC_BASE_PATH must be a folder of this user with mode 0700")
    return run_dir


def _serve(args: list[str]) -> None:
    # Here and not above: vLLM reads the environment as it is imported, and it takes seconds.
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    from server.engine.vllm.dtype import with_fitting_dtype

    sys.argv = ["vllm", *with_fitting_dtype(args)]
    serve()


if __name__ == "__mp_main__":
    harden_spawned_process()
elif __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
