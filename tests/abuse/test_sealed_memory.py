"""Attack W4: plaintext in core dumps, swap or written files; and memory stays constant while sealing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from server.errors import StartError
from server.sealed.memory import forbid_swap, is_memory_backed
from tests.unit.sealed.workshop import open_workshop, pattern

ROOT = Path(__file__).parents[2]
LIMIT_KIB = 512 * 1024
SEAL = """
import sys
from pathlib import Path
from server.sealed.kms.local import LocalKMS
from server.sealed.seal import seal_model
folder = Path(sys.argv[1])
seal_model(folder / "source", folder / "sealed", model_id="big", version=1,
           services=[LocalKMS(folder / "kms.key")], signer=None)
"""
QUANTIZE = SEAL.replace(
    'seal_model(folder / "source",', 'seal_model(quantize_source(load_source(folder / "source"), "w8a8"),'
)
QUANTIZE = (
    "from server.sealed.quantize import quantize_source\nfrom server.sealed.source import load_source\n" + QUANTIZE
)
LOAD = """
import sys
from pathlib import Path
from server.sealed.agent import KeyAgent
from server.sealed.kms.local import LocalKMS
from server.sealed.memory import forbid_core_dumps
from server.sealed.shard import ShardReader
forbid_core_dumps()
folder = Path(sys.argv[1])
agent = KeyAgent(services=[LocalKMS(folder / "kms.key")], trusted_signers=[], allow_unsigned=True,
                 record=lambda _tag, **_fields: None)
release = agent.release(folder / "sealed")
(shard,) = release.model.weights
with ShardReader(folder / "sealed", shard, release.model.core, release.data_key.reveal()) as reader:
    for entry in reader.index.entries:
        reader.read_into(entry.name, memoryview(bytearray(entry.num_bytes)))
status = Path("/proc/self/status").read_text()
if len(sys.argv) > 2:
    import os, signal
    os.kill(os.getpid(), signal.SIGSEGV)
"""


def write_sparse_model(folder: Path, num_bytes: int) -> None:
    folder.mkdir()
    info = {"w": {"dtype": "BF16", "shape": [num_bytes // 2], "data_offsets": [0, num_bytes]}}
    header = json.dumps(info).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + num_bytes)


def run(
    program: str, *args: str | Path, limit: bool = False, trace: Path | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, args)]
    if limit:
        command = ["bash", "-c", f'ulimit -v {LIMIT_KIB} && exec "$@"', "bash", *command]
    if trace is not None:
        strace = shutil.which("strace")
        if strace is None:
            pytest.fail("strace is missing; install it: apt-get install -y strace")
        calls = "trace=write,pwrite64,writev,pwritev,pwritev2,sendto,sendmsg,splice,copy_file_range,sendfile"
        command = [strace, "-f", "-e", calls, "-s", "4194304", "-xx", "-o", str(trace), *command]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def seal_under_limit(tmp_path: Path, num_bytes: int) -> None:
    open_workshop(tmp_path)
    write_sparse_model(tmp_path / "source", num_bytes)
    done = run(SEAL, tmp_path, limit=True)
    assert done.returncode == 0, done.stderr[-2000:]
    shard = tmp_path / "sealed" / "model-00001-of-00001.sealed"
    assert shard.stat().st_size > num_bytes
    shutil.rmtree(tmp_path / "sealed")


def test_sealing_takes_constant_memory(tmp_path: Path) -> None:
    seal_under_limit(tmp_path, 640 << 20)


@pytest.mark.slow
def test_sealing_four_gigabytes_in_half_a_gigabyte_of_address_space(tmp_path: Path) -> None:
    seal_under_limit(tmp_path, 4 << 30)


def small_model(tmp_path: Path) -> bytes:
    """A model whose bytes can be recognised, sealed; its source is gone."""
    open_workshop(tmp_path)
    (tmp_path / "source").mkdir()
    data = pattern("needle", 3 << 20)
    info = {"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}
    header = json.dumps(info).encode()
    (tmp_path / "source" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    return data


def written_by(trace: Path) -> bytes:
    """All bytes that the traced calls wrote."""
    found = re.findall(r'"((?:\\x[0-9a-f]{2})+)"', trace.read_text())
    return b"".join(bytes.fromhex(text.replace("\\x", "")) for text in found)


@pytest.mark.parametrize("program", [SEAL, LOAD], ids=["seal", "load"])
def test_no_system_call_writes_plaintext(tmp_path: Path, program: str) -> None:
    data = small_model(tmp_path)
    if program is LOAD:
        assert run(SEAL, tmp_path).returncode == 0
    trace = tmp_path / "trace"
    assert run(program, tmp_path, trace=trace).returncode == 0
    written = written_by(trace)
    if program is SEAL:
        assert len(written) > len(data)  # the trace does see what is written
    for offset in range(0, len(data) - 64, 4096):
        assert data[offset : offset + 64] not in written
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.parent.name != "source" and path != trace:
            assert data[:64] not in path.read_bytes()


# compressed-tensors imports a part of torch that announces its end.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_no_system_call_of_quantize_writes_plaintext(tmp_path: Path) -> None:
    """Neither the weight as it came nor the integers that it became; they are computed here as well."""
    from server.sealed.quantize import quantize_source
    from server.sealed.source import load_source
    from tests.unit.sealed.workshop import plaintext

    open_workshop(tmp_path)
    (tmp_path / "source").mkdir()
    generator = numpy.random.default_rng(7)
    weight = (generator.standard_normal((512, 1024)).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()  # bf16
    info = {"layers.0.up.weight": {"dtype": "BF16", "shape": [512, 1024], "data_offsets": [0, len(weight)]}}
    header = json.dumps(info).encode()
    (tmp_path / "source" / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weight)
    (tmp_path / "source" / "config.json").write_text("{}")
    integers = plaintext(quantize_source(load_source(tmp_path / "source"), "w8a8"))["layers.0.up.weight"]
    trace = tmp_path / "trace"
    done = run(QUANTIZE, tmp_path, trace=trace)
    assert done.returncode == 0, done.stderr[-2000:]
    written = written_by(trace)
    assert len(written) > len(integers) == 512 * 1024
    for data in (weight, integers):
        for offset in range(0, len(data) - 64, 4096):
            assert data[offset : offset + 64] not in written


def test_a_process_that_holds_plaintext_leaves_no_core(tmp_path: Path) -> None:
    small_model(tmp_path)
    assert run(SEAL, tmp_path).returncode == 0
    work = tmp_path / "work"
    work.mkdir()
    command = ["bash", "-c", 'ulimit -c unlimited; cd "$0" && exec "$@"', str(work), sys.executable, "-c", LOAD]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, str(tmp_path), "crash"], env=environment, capture_output=True, check=False)
    assert done.returncode == -11, done.stderr
    assert not list(work.iterdir())


def test_swap_is_refused_where_pages_cannot_be_locked(tmp_path: Path) -> None:
    swaps = tmp_path / "swaps"
    swaps.write_text("Filename Type Size Used Priority\n")
    forbid_swap(swaps)
    swaps.write_text("Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n")
    program = (
        "import resource, sys; from pathlib import Path\n"
        "import ctypes, server.sealed.memory as memory\n"
        "class Refusing:\n"
        "    def mlockall(self, _flags): ctypes.set_errno(1); return -1\n"
        "memory._libc = Refusing\n"
        "memory.forbid_swap(Path(sys.argv[1]))\n"
    )
    done = run(program, swaps)
    assert done.returncode == 1
    assert StartError.__name__ in done.stderr
    assert "/dev/sda2" in done.stderr
    assert "swapoff" in done.stderr


def test_tmpfs_is_told_from_a_disk(tmp_path: Path) -> None:
    assert is_memory_backed(Path("/dev/shm"))  # noqa: S108 - asked about, not written to
    assert not is_memory_backed(tmp_path)


@pytest.mark.parametrize("program", [SEAL, LOAD.replace("forbid_core_dumps()\n", "")], ids=["seal", "agent"])
def test_whoever_touches_a_data_key_can_not_be_dumped(tmp_path: Path, program: str) -> None:
    small_model(tmp_path)
    if program is not SEAL:
        assert run(SEAL, tmp_path).returncode == 0
    asking = (
        "import ctypes, resource\n"
        "assert ctypes.CDLL(None).prctl(3, 0, 0, 0, 0) == 0\n"  # PR_GET_DUMPABLE
        "assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)\n"
        "assert int(Path('/proc/self/coredump_filter').read_text(), 16) == 0\n"
    )
    done = run(program + asking, tmp_path)
    assert done.returncode == 0, done.stderr
