"""The engine's entry with a stand-in for vLLM: what each process has given up before it could load anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from server.engine.config import EXIT_REFUSED
from server.engine.isolation import isolate_network
from server.errors import ConfigError
from server.folders import make_private_dir

ROOT = Path(__file__).parents[2]

# Spawns a process that spawns another, as vLLM does with EngineCore and Worker; each reports on itself.
FAKE_VLLM = """
import ctypes, json, multiprocessing, os, resource, socket, sys, time

def report(folder, name):
    libc = ctypes.CDLL(None)
    signum = ctypes.c_int()
    libc.prctl(2, ctypes.byref(signum), 0, 0, 0)
    listener = socket.create_server(("127.0.0.1", 0))  # as Gloo does
    facts = {
        "pid": os.getpid(), "dumpable": libc.prctl(3, 0, 0, 0, 0), "death_signal": signum.value,
        "core": resource.getrlimit(resource.RLIMIT_CORE), "netns": os.readlink("/proc/self/ns/net"),
        "interfaces": sorted(name for _, name in socket.if_nameindex()), "argv": sys.argv, "env": dict(os.environ),
        "umask": os.umask(0o077),
    }
    with open(os.path.join(folder, name + ".tmp"), "w") as file:
        json.dump(facts, file)
    os.rename(file.name, os.path.join(folder, name))

def worker(folder):
    report(folder, "worker")
    time.sleep(60)

def core(folder):
    context = multiprocessing.get_context("spawn")
    context.Process(target=worker, args=(folder,)).start()
    report(folder, "core")
    time.sleep(60)

def main():
    folder = os.environ["VLLM_RPC_BASE_PATH"]
    multiprocessing.get_context("spawn").Process(target=core, args=(folder,)).start()
    report(folder, "server")
    time.sleep(60)
"""


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Starts the entry with the stand-in; kills its session afterwards."""
    package = tmp_path / "lib" / "vllm" / "entrypoints" / "launchers" / "api_server"
    package.mkdir(parents=True)
    (package / "entry.py").write_text(FAKE_VLLM)
    for folder in package.relative_to(tmp_path).parents[:-2]:
        (tmp_path / folder / "__init__.py").touch()
    (package / "__init__.py").touch()
    run_dir = tmp_path / "run"
    make_private_dir(run_dir)
    started: list[subprocess.Popen[str]] = []

    def start_entry(*args: str, mode: str = "auto", env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "server.engine.vllm.entry", "--network-isolation", mode, "--", *args]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}:{tmp_path / 'lib'}"}
        environment |= {"VLLM_RPC_BASE_PATH": str(run_dir), **(env or {})}
        process = subprocess.Popen(
            argv, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path
        )
        started.append(process)
        return process

    yield start_entry
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def facts_of(run_dir: Path, name: str) -> dict[str, Any]:
    end_s = time.monotonic() + 20
    while not (run_dir / name).exists() and time.monotonic() < end_s:
        time.sleep(0.01)
    facts: dict[str, Any] = json.loads((run_dir / name).read_text())
    return facts


def own_netns() -> str:
    return str(Path("/proc/self/ns/net").readlink())


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_each_process_has_given_everything_up(start: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (run_dir / "e.sock").touch()  # left behind by a killed engine
    process = start("--model", "m", "--uds", str(run_dir / "e.sock"))
    everyone = {name: facts_of(run_dir, name) for name in ("server", "core", "worker")}
    status = json.loads((run_dir / "isolation.json").read_text())
    for name, facts in everyone.items():
        assert facts["dumpable"] == 0, name
        assert facts["core"] == [0, 0], name
        assert facts["umask"] == 0o077, name
        assert facts["death_signal"] == 9, name
        if status["network"] != "none":
            assert facts["interfaces"] == ["lo"], name
            assert facts["netns"] != own_netns(), name
    assert not (run_dir / "e.sock").exists()
    assert everyone["server"]["argv"] == ["vllm", "--model", "m", "--uds", str(run_dir / "e.sock")]
    assert (run_dir / "isolation.json").stat().st_mode & 0o777 == 0o600
    process.kill()
    end_s = time.monotonic() + 5
    pids = [facts["pid"] for facts in everyone.values()]
    while any(is_alive(pid) for pid in pids) and time.monotonic() < end_s:
        time.sleep(0.01)
    assert not [pid for pid in pids if is_alive(pid)]


@pytest.mark.parametrize(
    ("args", "env", "said"),
    [
        (("--model", "m", "--trust-remote-code", "--uds", "/x"), {}, "--trust-remote-code"),
        (("--model", "m", "--uds", "/x", "--load-format", "pt"), {}, "--load-format pt"),
        (("--model", "m", "--uds", "/x"), {"VLLM_SERVER_DEV_MODE": "1"}, "VLLM_SERVER_DEV_MODE"),
        (("--model", "m", "--uds", "/x"), {"PYTHONOPTIMIZE": "1"}, "PYTHONOPTIMIZE"),
        (("--model", "m", "--uds", "/x"), {"VLLM_RPC_BASE_PATH": "/"}, "0700"),
        (("--model", "m"), {}, "--uds"),
        (("--model", "m", "--uds"), {}, ""),
    ],
)
def test_refused_before_vllm_is_imported(
    start: Any, tmp_path: Path, args: tuple[str, ...], env: Any, said: str
) -> None:
    process = start(*args, env=env)
    _, err = process.communicate(timeout=20)
    assert process.returncode == EXIT_REFUSED
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "server").exists()


def test_off_leaves_the_network(start: Any, tmp_path: Path) -> None:
    start("--model", "m", "--uds", str(tmp_path / "run" / "e.sock"), mode="off")
    assert facts_of(tmp_path / "run", "server")["netns"] == own_netns()
    status = json.loads((tmp_path / "run" / "isolation.json").read_text())
    assert (status["network"], status["reason"]) == ("none", "switched off")


def test_require_refuses_where_the_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("server.engine.isolation._unshare_network", refuse)
    with pytest.raises(ConfigError, match="require"):
        isolate_network("require")
    report = isolate_network("auto")
    assert (report.achieved, report.reason) == ("none", "the kernel refused: Operation not permitted")


def test_an_unprivileged_user_reaches_it_by_a_user_namespace(tmp_path: Path) -> None:
    """Root gives its rights up first, so that the way of ordinary users is taken."""
    code = """if True:
        import ctypes, os, socket
        from server.engine.isolation import isolate_network
        if os.getuid() == 0:
            os.setgid(65534); os.setuid(65534)
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # an ordinary user's process is dumpable to begin with
        report = isolate_network("auto")
        print(report.achieved, [n for _, n in socket.if_nameindex()], os.getuid(), report.reason)
        socket.create_server(("127.0.0.1", 0)).close()
        """
    env = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=env, check=False)
    if run.stdout.startswith("none"):
        assert "the kernel refused" in run.stdout  # user namespaces are switched off here: it is said, not hidden
    else:
        assert run.stdout.startswith("user-namespace ['lo']"), run.stderr


def test_a_private_folder_must_be_ours(tmp_path: Path) -> None:
    make_private_dir(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    (tmp_path / "open").mkdir(mode=0o777)
    make_private_dir(tmp_path / "open")
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "open")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(ConfigError):
            make_private_dir(tmp_path / name)
