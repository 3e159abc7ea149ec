"""Attack W4: every write of a whole server with a real engine, seen by the kernel: none holds a piece of a tensor.

One engine on a sealed model, from the start to an answer, below strace. A slow test: the trace stops each such call.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import yaml
from typing_extensions import override

from benchmarks.gateway.kit import wait_until
from server.bootstrap import prepare_embedded, prepare_folders, prepare_secrets
from server.sealed.embedded import load_embedded
from server.settings import load_settings
from tests.engine.test_serve import ROOT, Served

RUN_BYTES, RUNS_PER_TENSOR, MIN_TENSOR_BYTES = 64, 4, 1 << 16
WRITES = "write,pwrite64,writev,pwritev,pwritev2,sendto,sendmsg,sendmmsg,splice,vmsplice,tee,copy_file_range,sendfile"
OPENS = "open,openat,openat2,creat"
LONGEST_BYTES = 1 << 24
CONTROL = "import os, sys; os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT), bytes.fromhex(sys.argv[2]))"


class Runs:
    """Pieces of tensors, and where they stand in other bytes at whatever offset."""

    def __init__(self, runs: dict[bytes, str]) -> None:
        self._names = {run: name for run, name in runs.items() if len(set(run)) > RUN_BYTES // 4}
        self._firsts = numpy.unique(numpy.array([int.from_bytes(run[:8], "little") for run in self._names], "<u8"))

    def __len__(self) -> int:
        return len(self._names)

    @classmethod
    def of_embedded(cls) -> "Runs":
        runs: dict[bytes, str] = {}
        for shard in load_embedded().shards:
            for position, entry in enumerate(shard.index.entries):
                if entry.num_bytes < MIN_TENSOR_BYTES:
                    continue
                for part in range(RUNS_PER_TENSOR):
                    run = bytearray(RUN_BYTES)
                    shard.read_into(
                        position, entry.num_bytes * (2 * part + 1) // (2 * RUNS_PER_TENSOR), memoryview(run)
                    )
                    runs[bytes(run)] = entry.name
        return cls(runs)

    def found_in(self, data: bytes) -> list[str]:
        names = []
        for shift in range(8):
            num_words = max(0, len(data) - shift) // 8
            words = numpy.frombuffer(data[shift : shift + 8 * num_words], "<u8")
            for place in numpy.flatnonzero(numpy.isin(words, self._firsts)):
                at = shift + 8 * int(place)
                if (name := self._names.get(data[at : at + RUN_BYTES])) is not None:
                    names.append(name)
        return names


class Trace:
    """What strace wrote down: a file a process, strings in hexadecimal."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    def command(self) -> list[str]:
        strace = shutil.which("strace")
        if strace is None:
            pytest.fail("strace is missing; install it: apt-get install -y strace")
        return [
            strace, "-ff", "--seccomp-bpf", "-qq", "-xx", "-s", str(LONGEST_BYTES), "-e", f"trace={WRITES},{OPENS}",
            "-e", "signal=none", "-o", str(self._folder / "t"),
        ]  # fmt: skip

    def read(self) -> tuple[list[bytes], set[Path], set[str]]:
        """All that was written, what was opened to write to, and the calls that were seen."""
        written, opened, calls = [], set(), set()
        for path in self._folder.iterdir():
            with path.open() as lines:
                for line in lines:
                    call = line.split("(", 1)[0]
                    calls.add(call)
                    strings = [
                        bytes.fromhex(t.replace("\\x", "")) for t in re.findall(r'"((?:\\x[0-9a-f]{2})+)"', line)
                    ]
                    if call not in OPENS.split(","):
                        assert '"...' not in line, "a write was longer than the trace holds"
                        written += [text for text in strings if len(text) >= RUN_BYTES]
                    elif strings and re.search(r"O_WRONLY|O_RDWR|creat\(", line) and "= -1 " not in line:
                        opened.add(Path(os.fsdecode(strings[0])))
        return written, opened, calls


class TracedServer(Served):
    """`strongroom serve` below strace, on a state folder that is prepared already."""

    def __init__(self, state: Path, config: Path, trace: Trace) -> None:
        super().__init__(state)
        self._config, self._trace = config, trace

    @override
    def start(self) -> None:
        with (self.state.parent / "serve.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self._trace.command(), sys.executable, "-m", "server.cli", "serve", "--config", str(self._config),
                 "--port", str(self.port), "--state", str(self.state), "--prepare-embedded"],
                cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
            )  # fmt: skip

    @override
    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        os.kill(self.tree()[0], signum)  # strace keeps signals from what it runs
        return self.process.wait(300)


def chat_model_alone(folder: Path) -> Path:
    """The shipped configuration without the embedding model."""
    config = yaml.safe_load((ROOT / "configs" / "strongroom.yaml").read_text())
    config["models"] = config["models"][:1]
    for section in ("policy", "templates", "guard"):
        config[section]["directory"] = str(ROOT / "configs" / config[section]["directory"])
    path = folder / "strongroom.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_system_call_of_the_whole_server_writes_a_piece_of_a_tensor(tmp_path):
    runs = Runs.of_embedded()
    assert len(runs) > 500
    config, state = chat_model_alone(tmp_path), tmp_path / "state"
    settings = load_settings(config, {"state": str(state)})
    prepare_folders(settings.state)
    prepare_secrets(settings)
    prepare_embedded(settings, lambda _line: None)

    # The trace sees what it looks for, where it is.
    control, needle = Trace(tmp_path / "control"), next(iter(runs._names))
    arguments = [sys.executable, "-c", CONTROL, str(tmp_path / "leak"), (b"odd" + needle).hex()]
    subprocess.run([*control.command(), *arguments], check=True)
    written, opened, _ = control.read()
    assert any(runs.found_in(data) for data in written)
    assert tmp_path / "leak" in opened
    assert runs.found_in((tmp_path / "leak").read_bytes())
    (tmp_path / "leak").unlink()

    trace = Trace(tmp_path / "trace")
    server = TracedServer(state, config, trace)
    server.start()
    try:
        server.wait_ready()
        wait_until(lambda: server.chat().status_code == 200, limit_s=120, pause_s=1)
        _, opened, _ = trace.read()
        searched = 0
        for path in opened:
            # Memory that is shared through a file is written to without a call.
            if path.is_absolute() and path.is_file() and not path.is_relative_to("/proc"):
                assert not runs.found_in(path.read_bytes()), path
                searched += 1
        assert searched > 3
    finally:
        server.stop()
    written, _, calls = trace.read()
    assert {"write", "sendto", "openat"} <= calls
    assert sum(map(len, written)) > 100_000
    for data in written:
        assert not runs.found_in(data)
