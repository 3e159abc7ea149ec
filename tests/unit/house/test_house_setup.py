"""The set-up script refuses a machine that lacks something in one line that says what to do, and repeats no work."""

from __future__ import annotations

import importlib.util
import io
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[3]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(f"house_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_script("setup")

LOCK = """# a list
fastapi==1.2.3 \\
    --hash=sha256:aa
numpy==1 ; python_full_version < '3.13' \\
    --hash=sha256:bb
"""


def done(stdout: str = "", returncode: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], returncode, stdout, "")


@pytest.mark.parametrize(
    ("system", "machine", "version", "words"),
    [
        ("Linux", "x86_64", (3, 10, 4), "needs Python 3.11 to 3.14, this is 3.10"),
        ("Linux", "x86_64", (3, 15, 0), "this is 3.15"),
        ("Darwin", "x86_64", (3, 12, 0), "this is Darwin on x86_64"),
        ("Linux", "aarch64", (3, 12, 0), "this is Linux on aarch64"),
    ],
)
def test_foreign_platform_is_refused(system, machine, version, words):
    with pytest.raises(setup.SetupError, match=words):
        setup.check_platform(system, machine, version)


@pytest.mark.parametrize("minor", [11, 12, 13, 14])
def test_supported_platform_passes(minor):
    setup.check_platform("Linux", "x86_64", (3, minor, 0))


def test_port_in_use_is_refused_with_another_to_try():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(setup.SetupError, match=f"Port {port} on 127.0.0.1 is in use.*make serve PORT=8000"):
            setup.check_port(port)
    setup.check_port(port)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_port_out_of_range_is_refused(port):
    with pytest.raises(setup.SetupError, match="is no port"):
        setup.check_port(port)


def test_full_disk_is_refused_by_the_nearest_folder_that_exists(tmp_path):
    with pytest.raises(setup.SetupError, match=f"{tmp_path} has 1.0 GB free, 8.6 GB are needed"):
        setup.check_disk(tmp_path / "new" / "er", 8 << 30, usage=lambda _: SimpleNamespace(free=10**9))
    setup.check_disk(tmp_path, 8 << 30, usage=lambda _: SimpleNamespace(free=10**10))


@pytest.mark.parametrize(
    ("answer", "engine"),
    [(done("GPU 0: NVIDIA H100 (UUID: GPU-1)\n"), "gpu"), (done("", 9), "cpu"), (done("No devices found.\n"), "cpu")],
)
def test_engine_follows_nvidia_smi(answer, engine):
    assert setup.detect_engine(lambda *_, **__: answer) == engine


def test_engine_is_cpu_without_nvidia_smi():
    def absent(*_, **__):
        raise FileNotFoundError

    assert setup.detect_engine(absent) == "cpu"


def test_pins_are_read_from_a_locked_list():
    assert setup.parse_pins(LOCK) == {"fastapi": "1.2.3", "numpy": "1"}


PINS = {"fastapi": "1.2.3", "torch": "2.13.0+cpu", "vllm": "0.32.0"}


@pytest.mark.parametrize(
    ("engine", "index", "words"),
    [
        ("cpu", {}, "pip finds no package index.*PIP_INDEX_URL"),
        ("cpu", {"fastapi": ["1.0"]}, r"has no fastapi 1\.2\.3 \(newest seen: 1\.0\)"),
        ("cpu", {"fastapi": ["1.2.3"], "torch": ["2.13.0"]}, "PIP_EXTRA_INDEX_URL=<url> make serve, or PIP_FIND_LINKS"),
        ("gpu", {"fastapi": ["1.2.3"], "vllm": []}, "vllm 0.32.0 could not be looked up"),
    ],
)
def test_index_without_a_pinned_package_is_refused(engine, index, words):
    with pytest.raises(setup.SetupError, match=words) as caught:
        setup.check_registry(engine, PINS, lambda name: index.get(name, []))
    assert "Nothing was installed" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_index_with_the_pinned_packages_passes():
    setup.check_registry("cpu", PINS, lambda name: ["9", PINS[name]])


@pytest.fixture
def clone(tmp_path):
    """A clone whose `.venv` holds the CPU list."""
    (tmp_path / "locks").mkdir()
    for name in ("serve-cpu", "serve-gpu", "dev"):
        (tmp_path / "locks" / f"{name}.txt").write_text(f"# {name}\n{LOCK}")
    env = setup.Environment(tmp_path)
    env.python.parent.mkdir(parents=True)
    env.python.symlink_to(sys.executable)
    (env.path / "pyvenv.cfg").touch()
    env.write_stamp({"root": str(tmp_path), "locks/serve-cpu.txt": env.digest("locks/serve-cpu.txt")})
    return tmp_path


def test_second_run_has_nothing_to_do(clone):
    assert setup.Environment(clone).missing(["locks/serve-cpu.txt"]) == []


def test_tests_add_to_what_serves(clone):
    assert setup.Environment(clone).missing(["locks/serve-cpu.txt", "locks/dev.txt"]) == ["locks/dev.txt"]


def test_changed_list_is_installed_again(clone):
    (clone / "locks" / "serve-cpu.txt").write_text(LOCK)
    assert setup.Environment(clone).missing(["locks/serve-cpu.txt"]) == ["locks/serve-cpu.txt"]


def test_what_is_no_longer_locked_is_removed(clone, monkeypatch):
    installed = done("pip\nstrongroom\nfastapi\nNumPy\nold_one\n")
    monkeypatch.setattr(setup.subprocess, "run", lambda *_, **__: installed)
    env, commands = setup.Environment(clone), []
    monkeypatch.setattr(env, "_pip", lambda command, *_: commands.append(command[1:]))
    env.prune(["locks/serve-cpu.txt"])
    assert commands == [["-m", "pip", "uninstall", "--yes", "old-one"]]


def test_new_package_of_the_project_means_installing_it_again(clone):
    env = setup.Environment(clone)
    (clone / "pyproject.toml").touch()
    before = env.project_digest()
    (clone / "kernels" / "serving_kernels").mkdir(parents=True)
    assert env.project_digest() != before


def test_other_engine_means_a_new_environment(clone):
    assert setup.Environment(clone).missing(["locks/serve-gpu.txt"]) is None


def test_moved_clone_means_a_new_environment(clone, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "clone"
    clone.rename(moved)
    assert setup.Environment(moved).missing(["locks/serve-cpu.txt"]) is None


def test_interrupted_install_is_begun_again(clone):
    env = setup.Environment(clone)
    (env.path / "strongroom-setup-unfinished").touch()
    (env.path / "leftover").touch()
    assert env.missing(["locks/serve-cpu.txt"]) is None
    env.create(lambda *_, **__: done())
    assert not (env.path / "leftover").exists()


def test_python_without_venv_is_refused_with_the_package_to_install(tmp_path):
    env = setup.Environment(tmp_path)
    with pytest.raises(setup.SetupError, match=r"apt-get install python3\.\d+-venv"):
        env.create(lambda *_, **__: done(returncode=1))
    assert not env.path.exists()


def test_environment_of_somebody_else_is_not_touched(tmp_path):
    env = setup.Environment(tmp_path)
    env.path.mkdir()
    (env.path / "pyvenv.cfg").touch()
    with pytest.raises(setup.SetupError, match="was not made by this set-up"):
        env.create()
    assert (env.path / "pyvenv.cfg").exists()


def test_pip_failure_is_one_line(tmp_path):
    log = tmp_path / "log"
    mismatch = [
        "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
        "    torch==2.13.0+cpu from x:",
    ]
    assert setup.explain_pip(mismatch, log).startswith(
        "torch==2.13.0+cpu from your index is not the file that was locked"
    )
    assert "disk ran full" in setup.explain_pip(["ERROR: [Errno 28] No space left on device"], log)
    headers = ["foo.c:1:10: fatal error: Python.h: No such file or directory"]
    assert "apt-get install python3" in setup.explain_pip(headers, log)
    assert setup.explain_pip(["x", "ERROR: no such thing", "y"], log).startswith("pip failed: no such thing Mend that")


def test_progress_names_the_package_and_keeps_the_words(capsys):
    reader, writer = os.pipe()
    os.write(
        writer, b"Collecting torch==2.13.0\n  Downloading torch.whl (182 MB)\nInstalling collected packages: torch\n"
    )
    os.close(writer)
    sink, begun = io.BytesIO(), []
    with os.fdopen(reader, "rb") as stream:
        lines = setup.follow(stream, sink, 3, "installing packages", lambda: begun.append(True))
    assert begun == [True]
    assert lines[0] == "Collecting torch==2.13.0"
    assert b"182 MB" in sink.getvalue()
    assert "installing packages: done" in capsys.readouterr().out


def test_missing_debian_packages_are_found():
    listed = done("redis-server installed\nswtpm not-installed\n", 1)
    assert setup.missing_apt(["redis-server", "swtpm", "unknown"], lambda *_, **__: listed) == ["swtpm", "unknown"]
