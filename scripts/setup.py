"""Make this clone ready to run; the first step of `make serve`, `make setup` and `make test`.

Plain Python without packages, since it runs before any is installed. It checks everything it can before it changes
anything, fills `.venv` from the locked lists with pip (so that pip's own configuration and environment variables hold),
and then becomes the command that was asked for. A run that finds everything in place does nothing.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import select
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

ROOT = Path(__file__).resolve().parent.parent

MIN_PYTHON, END_PYTHON = (3, 11), (3, 15)
INSTALL_BYTES = 8 << 30  # environment 3.6 GB (CPU engine), pip's cache of the wheels 1 GB, the unpacking, the models
RUN_BYTES = 1 << 30

# One package that tells whether pip reaches a registry at all, and the one that its registry may lack, by engine.
PROBES = {"cpu": ("fastapi", "torch"), "gpu": ("fastapi", "vllm")}


class SetupError(Exception):
    """The machine lacks something; the message is one line that says what to do about it."""


# --- checks ---------------------------------------------------------------------------------------------------------


def check_platform(system: str, machine: str, version: tuple[Any, ...]) -> None:
    """Refuse what the locked lists hold no packages for."""
    if not MIN_PYTHON <= version[:2] < END_PYTHON:
        raise SetupError(
            f"Strongroom needs Python 3.11 to 3.14, this is {version[0]}.{version[1]}. "
            "Install one and name it: make serve PYTHON=/path/to/python3.12"
        )
    if (system, machine) != ("Linux", "x86_64"):
        raise SetupError(
            f"The locked packages are for Linux on x86_64, this is {system} on {machine}. "
            "Use such a machine, or the container image (make image)."
        )


def check_port(port: int) -> None:
    """Refuse a port that the gateway could not listen on."""
    if not 1 <= port <= 65535:
        raise SetupError(f"PORT={port} is no port; choose one from 1 to 65535: make serve PORT=8001")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as err:
            if err.errno == errno.EACCES:
                raise SetupError(f"Port {port} needs root. Choose one above 1023: make serve PORT=8000") from err
            other = 8001 if port == 8000 else 8000
            raise SetupError(
                f"Port {port} on 127.0.0.1 is in use. Stop what listens there, or choose another: "
                f"make serve PORT={other}"
            ) from err


def check_disk(folder: Path, need_bytes: int, usage: Callable[[Path], Any] = shutil.disk_usage) -> None:
    """Refuse a file system too full for what will be written below `folder`."""
    while not folder.exists():
        folder = folder.parent
    free_bytes = usage(folder).free
    if free_bytes < need_bytes:
        raise SetupError(
            f"{folder} has {free_bytes / 1e9:.1f} GB free, {need_bytes / 1e9:.1f} GB are needed. "
            "Free some space there, or clone to (and point STATE at) a larger disk."
        )


def detect_engine(run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> str:
    """Return `gpu` where `nvidia-smi` lists a device, else `cpu`."""
    try:
        listed = run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "gpu" if listed.returncode == 0 and "GPU " in listed.stdout else "cpu"


def parse_pins(lock: str) -> dict[str, str]:
    """Return name to version of a locked list (of the first entry where markers choose between several)."""
    pins: dict[str, str] = {}
    for name, version in re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)", lock, flags=re.MULTILINE):
        pins.setdefault(name, version)
    return pins


def check_registry(engine: str, pins: dict[str, str], versions: Callable[[str], list[str]]) -> None:
    """Refuse an index that does not answer, or lacks a pinned package, before anything is installed.

    Args:
        engine: `cpu` or `gpu`.
        pins: What the locked list names.
        versions: Returns the versions of a package that pip can see from here.
    """
    for name in PROBES[engine]:
        seen, wanted = versions(name), pins[name]
        if wanted in seen:
            continue
        if name == "torch":
            raise SetupError(
                f"None of pip's indexes has torch {wanted} for this Python (it is not on PyPI). Point pip at PyTorch's "
                "package index for the CPU, or at a folder with the wheel, and run again: "
                "PIP_EXTRA_INDEX_URL=<url> make serve, or PIP_FIND_LINKS=<folder> make serve. Nothing was installed."
            )
        if seen:
            raise SetupError(
                f"The package index has no {name} {wanted} (newest seen: {seen[0]}). Point pip at an up-to-date index: "
                "PIP_INDEX_URL=<url> make serve. Nothing was installed."
            )
        raise SetupError(
            f"pip finds no package index ({name} {wanted} could not be looked up). Check the network and pip's "
            "configuration (pip config list), or name an index: PIP_INDEX_URL=<url> make serve. Nothing was installed."
        )


# --- the virtual environment ----------------------------------------------------------------------------------------


class Environment:
    """The clone's `.venv`, with a stamp that says which locked lists it holds.

    Args:
        root: The clone.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.path = root / ".venv"
        self.python = self.path / "bin" / "python"
        self._stamp = self.path / "strongroom-setup.json"

    def digest(self, name: str) -> str:
        """Return the SHA-256 of a file of the clone."""
        return hashlib.sha256((self.root / name).read_bytes()).hexdigest()

    def stamp(self) -> dict[str, str]:
        """Return file name to digest of what was installed; empty if the last install did not finish."""
        try:
            return dict(json.loads(self._stamp.read_text()))
        except (OSError, ValueError):
            return {}

    def write_stamp(self, entries: dict[str, str]) -> None:
        """Record what is installed now, all or nothing."""
        partial = self._stamp.with_suffix(".new")
        partial.write_text(json.dumps(entries, indent=1))
        partial.replace(self._stamp)

    def missing(self, locks: Sequence[str]) -> list[str] | None:
        """Return which of `locks` must still be installed, or None if the environment must be made anew."""
        stamp = self.stamp()
        other_engine = [name for name in stamp if name.startswith("locks/serve-") and name not in locks]
        usable = stamp.get("root") == str(self.root) and os.access(self.python, os.X_OK)
        if other_engine or not usable or self._unfinished.exists():
            return None
        return [name for name in locks if stamp.get(name) != self.digest(name)]

    def project_digest(self) -> str:
        """Return a digest of what an editable install depends on: the settings, and which packages there are."""
        packages = [name for name in ("server", "benchmarks", "kernels/serving_kernels") if (self.root / name).is_dir()]
        return hashlib.sha256(f"{self.digest('pyproject.toml')} {packages}".encode()).hexdigest()

    def create(self, run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run) -> None:
        """Make an empty environment in place of what an earlier, unfinished or outdated set-up left."""
        if self.path.exists():
            if not (self.path / "pyvenv.cfg").exists() or not (self._stamp.exists() or self._unfinished.exists()):
                raise SetupError(f"{self.path} was not made by this set-up. Move it away (or rm -r it) and run again.")
            say("clearing .venv: the last set-up did not finish, or was for another engine or folder")
            self._stamp.unlink(missing_ok=True)
            self._unfinished.touch()
            shutil.rmtree(self.path)
        self.path.mkdir()
        self._unfinished.touch()
        made = run([sys.executable, "-m", "venv", str(self.path)], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            self.remove()
            version = f"{sys.version_info[0]}.{sys.version_info[1]}"
            raise SetupError(
                f"{sys.executable} can't make a virtual environment. On Debian and Ubuntu: "
                f"apt-get install python{version}-venv"
            )

    @property
    def _unfinished(self) -> Path:
        return self.path / "strongroom-setup-unfinished"

    def finish(self) -> None:
        """Take away the mark that an install is under way."""
        self._unfinished.unlink(missing_ok=True)

    def remove(self) -> None:
        """Take the environment away again."""
        shutil.rmtree(self.path, ignore_errors=True)

    def versions(self, name: str) -> list[str]:
        """Return the versions of a package that pip can see from here, newest first."""
        command = [str(self.python), "-m", "pip", "index", "versions", name, "--retries", "1", "--timeout", "20"]
        listed = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        found = re.search(r"^Available versions: (.*)$", listed.stdout, flags=re.MULTILINE)
        return found.group(1).split(", ") if listed.returncode == 0 and found else []

    def install(self, locks: Sequence[str]) -> None:
        """Install locked lists with pip; packages come as wheels only, but for the development list."""
        total = sum(len(parse_pins((self.root / name).read_text())) for name in locks)
        command = [
            str(self.python),
            "-m",
            "pip",
            "install",
            "--no-input",
            "--progress-bar",
            "off",
            "--no-deps",
            "--require-hashes",
        ]
        if "locks/dev.txt" not in locks:
            command += ["--only-binary", ":all:"]
        command += [part for name in locks for part in ("-r", str(self.root / name))]
        self._pip(command, total, "installing packages")

    def prune(self, locks: Collection[str]) -> None:
        """Uninstall what no locked list names (any more)."""
        listing = "import importlib.metadata as m; print(*{d.name for d in m.distributions()}, sep='\\n')"
        listed = subprocess.run([str(self.python), "-I", "-c", listing], capture_output=True, text=True, check=True)
        named = {"pip", "strongroom"}.union(*(parse_pins((self.root / name).read_text()) for name in locks))
        extra = sorted({re.sub(r"[-_.]+", "-", name).lower() for name in listed.stdout.split()} - named)
        if extra:
            say(f"removing {len(extra)} packages that are no longer locked: {' '.join(extra)}")
            self._pip([str(self.python), "-m", "pip", "uninstall", "--yes", *extra], len(extra), "removing packages")

    def install_project(self) -> None:
        """Make `strongroom` and its vLLM plug-in known to the environment; needs no network."""
        command = [
            str(self.python),
            "-m",
            "pip",
            "install",
            "--no-input",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
        ]
        self._pip([*command, "--editable", str(self.root)], 1, "installing the project")

    def _pip(self, command: list[str], total: int, title: str) -> None:
        log = self.path / "strongroom-setup.log"
        with log.open("ab") as sink:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.root
            )
            try:
                lines = follow(cast("IO[bytes]", process.stdout), sink, total, title, self._unfinished.touch)
            except BaseException:
                process.terminate()
                process.wait()
                raise
            if process.wait() != 0:
                raise SetupError(explain_pip(lines, log))


def explain_pip(lines: list[str], log: Path) -> str:
    """Return one line on why pip failed and what to do about it."""
    text = "\n".join(lines)
    if "DO NOT MATCH THE HASHES" in text:
        culprit = re.search(r"^\s+(\S+)(?: from|==)", text[text.index("DO NOT MATCH") :], flags=re.MULTILINE)
        name = culprit.group(1) if culprit else "a package"
        return (
            f"{name} from your index is not the file that was locked (its SHA-256 differs), so nothing was installed. "
            "Use an index that serves the original, or trust yours: docs/dependencies.md, 'A wheel of your own'."
        )
    if "No space left on device" in text:
        return "The disk ran full while installing. Free some space (or set TMPDIR to a larger disk) and run again."
    if "Python.h: No such file" in text:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return f"A test package needs Python's headers: apt-get install python{version}-dev, then run again."
    first = next((line for line in lines if line.startswith("ERROR: ")), lines[-1] if lines else "no output")
    return f"pip failed: {first.removeprefix('ERROR: ')} Mend that and run again; pip's words: {log}"


def follow(stream: IO[bytes], sink: IO[bytes], total: int, title: str, begins: Callable[[], object]) -> list[str]:
    """Copy pip's output to `sink` while saying on the terminal how far it is; return its last lines.

    `begins` is called when pip has fetched everything and begins to change the environment.
    """
    lines: list[str] = []
    pending, done, what, start, spoken = b"", 0, "", time.monotonic(), 0.0
    while True:
        ready, _, _ = select.select([stream], [], [], 1.0)
        data = os.read(stream.fileno(), 65536) if ready else None
        if data == b"":
            break
        if data:
            sink.write(data)
            *whole, pending = (pending + data).split(b"\n")
            for raw in whole:
                line = raw.decode(errors="replace").rstrip()
                lines = [*lines[-199:], line]
                if line.startswith(("Collecting ", "Processing ", "Obtaining ")):
                    done, what = done + 1, re.split(r"[=\s]", line.split(" ", 1)[1])[0].rpartition("/")[2]
                elif line.lstrip().startswith("Downloading ") and "(" in line:
                    what = f"{what.split(' ')[0]} {line[line.rindex('(') :]}"
                elif line.startswith("Installing collected packages"):
                    what = "unpacking"
                    begins()
        elapsed = time.monotonic() - start
        if sys.stdout.isatty() or elapsed - spoken >= 15:
            spoken = elapsed
            say(f"{title}: {min(done, total)} of {total}, {what} ({elapsed:.0f} s)", passing=True)
    say(f"{title}: done in {time.monotonic() - start:.0f} s")
    return lines


def say(text: str, *, passing: bool = False) -> None:
    """Print a line of progress; on a terminal a passing one is overwritten by the next."""
    if sys.stdout.isatty():
        sys.stdout.write(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}" + ("" if passing else "\n"))
    else:
        sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def install(root: Path, engine: str, *, dev: bool) -> None:
    """Bring `.venv` to what the locked lists say.

    Raises:
        SetupError: Something is missing; what a fresh install began is taken away again.
    """
    env = Environment(root)
    locks = [f"locks/serve-{engine}.txt", *(["locks/dev.txt"] if dev else [])]
    with (root / ".setup.lock").open("w") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this clone is running; waiting for it")
            fcntl.flock(guard, fcntl.LOCK_EX)
        missing = env.missing(locks)
        if missing is None:
            check_disk(root, INSTALL_BYTES)
            say(f"setting up .venv for the {engine.upper()} engine (once; a few minutes)")
            env.create()
            try:
                check_registry(engine, parse_pins((root / locks[0]).read_text()), env.versions)
                env.install(locks)
            except SetupError:
                env.remove()
                raise
            env.write_stamp({"root": str(root), **{name: env.digest(name) for name in locks}})
            env.finish()
        elif missing:
            check_disk(root, RUN_BYTES)
            env.install(missing)
            held = [name for name in env.stamp() if name.startswith("locks/") and (root / name).exists()]
            env.prune({*held, *locks})
            env.write_stamp({**env.stamp(), **{name: env.digest(name) for name in missing}})
            env.finish()
        if env.stamp().get("project") != env.project_digest():
            env.install_project()
            env.write_stamp({**env.stamp(), "project": env.project_digest()})
            env.finish()


# --- what the tests need from the system ----------------------------------------------------------------------------


def missing_apt(
    wanted: Sequence[str], status: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
) -> list[str]:
    """Return which Debian packages are not installed; all, where dpkg is not known."""
    try:
        query = ["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\\n", *wanted]
        listed = status(query, capture_output=True, text=True, check=False)
    except OSError:
        return list(wanted)
    installed = {line.split(" ")[0] for line in listed.stdout.splitlines() if line.endswith(" installed")}
    return [name for name in wanted if name not in installed]


def install_system(root: Path) -> None:
    """Install the Debian packages that the tests start real servers from.

    Raises:
        SetupError: They are missing and this user may not install them; names the command.
    """
    wanted = [line.split("#")[0].strip() for line in (root / "scripts" / "apt-packages.txt").read_text().splitlines()]
    missing = missing_apt([name for name in wanted if name])
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    manual = SetupError(f"The tests need Debian packages. Install them and run again: sudo {' '.join(command)}")
    if shutil.which("apt-get") is None:
        raise manual
    prefix: list[str] = []
    if os.geteuid() != 0:
        prefix = ["sudo", "-n"]
        if (
            shutil.which("sudo") is None
            or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
        ):
            raise manual
    say(f"installing {len(missing)} Debian packages: {' '.join(missing)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["apt-get", "update", "-q"], command):
        done = subprocess.run(
            [*prefix, *step], capture_output=True, text=True, check=False, env=env, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise SetupError(f"{' '.join(step)} failed: {' '.join(reason)} Mend that and run again.")


def install_node(root: Path) -> None:
    """Install the locked npm packages that the tests drive clients and servers with.

    Raises:
        SetupError: Node.js is missing or too old, or npm failed.
    """
    folder = root / "tests" / "node"
    lock = folder / "package-lock.json"
    if not lock.exists():
        return
    digest, stamp = hashlib.sha256(lock.read_bytes()).hexdigest(), folder / "node_modules" / ".strongroom-setup"
    if stamp.exists() and stamp.read_text() == digest:
        return
    version = (
        subprocess.run(["node", "--version"], capture_output=True, text=True, check=False)
        if shutil.which("node")
        else None
    )
    if (
        version is None
        or int(version.stdout.strip().lstrip("v").split(".")[0] or 0) < 20
        or shutil.which("npm") is None
    ):
        raise SetupError("The tests need Node.js 20 or newer with npm on the PATH. Install it and run again.")
    say("installing npm packages of tests/node")
    done = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        raise SetupError(f"npm ci in tests/node failed: {' '.join(done.stderr.strip().splitlines()[-3:])}")
    stamp.write_text(digest)


# --- the command ----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of `serve`, `install`, `test`; see `--help`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("serve", "set up, then start Strongroom with the embedded model"),
        ("install", "set up .venv to serve"),
        ("test", "set up .venv, Debian and npm packages to test"),
    ):
        sub = verbs.add_parser(verb, help=text)
        sub.add_argument("--engine", choices=("auto", "cpu", "gpu"), default="auto", help="which build of vLLM")
        if verb == "serve":
            sub.add_argument("--port", type=int, default=8000)
            sub.add_argument("--state", type=Path, default=Path(".strongroom"))
    args = parser.parse_args(argv)
    try:
        check_platform(platform.system(), platform.machine(), sys.version_info[:3])
        if args.verb == "serve":
            check_port(args.port)
            check_port(args.port + 1)  # the admin listener's
            check_disk(args.state.absolute(), RUN_BYTES)
        engine = detect_engine() if args.engine == "auto" else args.engine
        if args.verb == "test":
            install_system(ROOT)
        install(ROOT, engine, dev=args.verb == "test")
        if args.verb == "test":
            install_node(ROOT)
    except SetupError as err:
        sys.stdout.flush()
        print(f"strongroom: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstrongroom: interrupted; the next run goes on from here", file=sys.stderr)
        return 130
    if args.verb == "serve":
        command = str(ROOT / ".venv" / "bin" / "strongroom")
        config, state = str(ROOT / "configs" / "strongroom.yaml"), str(args.state)
        os.execv(
            command,
            [command, "serve", "--config", config, "--port", str(args.port), "--state", state, "--prepare-embedded"],
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
