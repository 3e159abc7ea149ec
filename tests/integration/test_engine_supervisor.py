"""The supervisor with children that die, hang, refuse and multiply."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from server.engine.child import ChildEvent, ChildSpec, Handover, RestartPolicy
from server.engine.supervisor import Supervisor
from server.engine.tree import tree_members
from server.errors import ConfigError, KMSUnreachableError, StartError

QUICK = RestartPolicy(initial_s=0.01, max_s=0.05, stable_s=60)
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - not a file of ours: where the kernel shows it
ROOT = Path(__file__).parents[2]

# A child with a child of its own, and one that has left the session, as a daemon would.
FAMILY = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
open(sys.argv[1], "w").write("x")
time.sleep(60)
"""


@dataclass
class Events:
    seen: list[tuple[ChildEvent, str, dict[str, Any]]] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, event: ChildEvent, child: str, detail: dict[str, Any]) -> None:
        self.seen.append((event, child, detail))
        self.news.set()

    def of(self, child: str) -> list[ChildEvent]:
        return [event for event, name, _ in self.seen if name == child]

    async def wait(self, event: ChildEvent, count: int = 1, limit_s: float = 10.0) -> dict[str, Any]:
        async with asyncio.timeout(limit_s):
            while len(found := [detail for kind, _, detail in self.seen if kind == event]) < count:
                self.news.clear()
                await self.news.wait()
        return found[count - 1]


async def yes() -> bool:
    return True


async def no() -> bool:
    return False


def spec(name: str, code: str, *args: str, **fields: Any) -> ChildSpec:
    fields.setdefault("ready", yes)
    fields.setdefault("restart_policy", QUICK)
    fields.setdefault("grace_s", 2.0)
    return ChildSpec(name, (sys.executable, "-I", "-S", "-c", code, *args), dict(os.environ), **fields)


def exists(path: Path) -> Any:
    async def ready() -> bool:
        return os.access(path, os.F_OK)

    return ready


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def test_starts_in_order_and_stops_in_the_opposite_one(tmp_path: Path) -> None:
    events = Events()
    first = spec("first", "import time; time.sleep(0.1); open(__import__('sys').argv[1], 'w'); time.sleep(60)",
                 str(tmp_path / "f"), ready=exists(tmp_path / "f"))  # fmt: skip
    supervisor = Supervisor((first, spec("second", "import time; time.sleep(60)")), events)
    progress: list[str] = []
    await supervisor.start(lambda name, _s: progress.append(name))
    await supervisor.stop()
    assert [(event, name) for event, name, _ in events.seen] == [
        (ChildEvent.STARTING, "first"),
        (ChildEvent.READY, "first"),
        (ChildEvent.STARTING, "second"),
        (ChildEvent.READY, "second"),
        (ChildEvent.STOPPING, "second"),
        (ChildEvent.STOPPED, "second"),
        (ChildEvent.STOPPING, "first"),
        (ChildEvent.STOPPED, "first"),
    ]
    assert "first" in progress


async def test_a_gateway_is_stopped_before_its_engine() -> None:
    events = Events()
    gateway = spec("gateway", "import time; time.sleep(60)", stops_first=True)
    others = tuple(spec(name, "import time; time.sleep(60)") for name in ("engine", "other engine"))
    supervisor = Supervisor((spec("writer", "import time; time.sleep(60)"), gateway, *others), events)
    await supervisor.start()
    await supervisor.stop()
    stopped = [name for event, name, _ in events.seen if event == ChildEvent.STOPPED]
    assert stopped == ["gateway", "other engine", "engine", "writer"]


async def test_a_swap_replaces_one_child_only() -> None:
    events = Events()
    old = spec("engine", "import time; time.sleep(60)")
    supervisor = Supervisor((spec("writer", "import time; time.sleep(60)"), old), events)
    await supervisor.start()
    process = supervisor.children["engine"].process
    assert process is not None
    await supervisor.swap(spec("engine", "import time; time.sleep(61)"))
    await events.wait(ChildEvent.READY, 3)
    assert not is_alive(process.pid)
    assert supervisor.children["engine"].spec.argv[-1].endswith("61)")
    assert events.of("writer") == [ChildEvent.STARTING, ChildEvent.READY]
    await supervisor.stop()


async def test_a_key_service_that_does_not_answer_is_asked_again() -> None:
    async def unreachable() -> None:
        raise KMSUnreachableError("no answer")

    events = Events()
    supervisor = Supervisor((spec("c", "", before_start=unreachable),), events)
    task = asyncio.create_task(supervisor.start())
    await events.wait(ChildEvent.STARTING, 3)
    supervisor.request_stop()
    with pytest.raises(StartError):
        await task


async def test_what_dies_is_started_again() -> None:
    events = Events()
    supervisor = Supervisor((spec("c", "import time; time.sleep(60)"),), events)
    await supervisor.start()
    for count in (1, 2):
        pid = (await events.wait(ChildEvent.READY, count))["pid"]
        os.kill(pid, signal.SIGKILL)
        assert (await events.wait(ChildEvent.EXITED, count))["code"] == -signal.SIGKILL
    await events.wait(ChildEvent.READY, 3)
    await supervisor.stop()
    assert supervisor.children["c"].num_restarts == 2


@pytest.mark.parametrize("end", ["stop", "crash"])
async def test_no_process_of_the_tree_is_left(tmp_path: Path, end: str) -> None:
    events = Events()
    supervisor = Supervisor((spec("c", FAMILY, str(tmp_path / "f"), ready=exists(tmp_path / "f")),), events)
    await supervisor.start()
    pid = (await events.wait(ChildEvent.READY))["pid"]
    tree = tree_members(pid)
    assert len(tree) == 3
    if end == "crash":
        (tmp_path / "f").unlink()  # the next one is not ready before the old tree is looked at
        os.kill(pid, signal.SIGKILL)
        await events.wait(ChildEvent.EXITED)
    else:
        await supervisor.stop()
    assert not any(is_alive(member) for member in tree)
    assert not tree_members(pid)
    await supervisor.stop()


async def test_shared_memory_of_a_killed_child_is_removed(tmp_path: Path) -> None:
    """vLLM passes prompts through it, and a killed process leaves it in /dev/shm."""
    code = """if True:
        import os, sys, time
        from multiprocessing.shared_memory import SharedMemory
        memory = SharedMemory(create=True, size=4096)
        with open(sys.argv[1] + ".tmp", "w") as file:
            file.write(memory.name)
        os.rename(file.name, sys.argv[1])
        time.sleep(60)
        """
    events = Events()
    supervisor = Supervisor((spec("c", code, str(tmp_path / "f"), ready=exists(tmp_path / "f")),), events)
    await supervisor.start()
    memory = SHARED_MEMORY / (tmp_path / "f").read_text()
    assert memory.exists()
    os.kill((await events.wait(ChildEvent.READY))["pid"], signal.SIGKILL)
    await events.wait(ChildEvent.EXITED)
    assert not memory.exists()
    await supervisor.stop()


async def test_a_child_that_ignores_the_signal_is_killed(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); open(sys.argv[1], 'w'); time.sleep(60)"
    child = spec("c", code, str(tmp_path / "f"), ready=exists(tmp_path / "f"), grace_s=0.2)
    supervisor = Supervisor((child,))
    await supervisor.start()
    start_s = time.monotonic()
    await supervisor.stop()
    assert 0.15 < time.monotonic() - start_s < 30


async def test_a_child_that_still_starts_is_not_waited_for(tmp_path: Path) -> None:
    code = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); open(sys.argv[1], 'w'); time.sleep(600)"
    deaf = spec("c", code, str(tmp_path / "f"), ready=no, grace_s=600.0, awaited=False)
    supervisor = Supervisor((deaf,))
    await supervisor.start()
    async with asyncio.timeout(60):
        while not await exists(tmp_path / "f")():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.01)
        await supervisor.stop()


async def test_a_failing_health_check_restarts_the_whole_tree(tmp_path: Path) -> None:
    healthy = asyncio.Event()
    healthy.set()

    async def health() -> bool:
        return healthy.is_set()

    events = Events()
    child = spec("c", FAMILY, str(tmp_path / "f"), ready=exists(tmp_path / "f"), healthy=health,
                 health_interval_s=0.02, max_health_failures=3)  # fmt: skip
    supervisor = Supervisor((child,), events)
    await supervisor.start()
    pid = (await events.wait(ChildEvent.READY))["pid"]
    tree = tree_members(pid)
    healthy.clear()
    assert (await events.wait(ChildEvent.UNHEALTHY))["failures"] == 3
    healthy.set()
    await events.wait(ChildEvent.READY, 2)
    assert not any(is_alive(member) for member in tree if member != pid)
    await supervisor.stop()


async def test_a_health_check_that_hangs_or_raises_has_failed() -> None:
    async def hangs() -> bool:
        await asyncio.sleep(60)
        return True

    async def raises() -> bool:
        raise OSError("x")

    for check in (hangs, raises):
        events = Events()
        child = spec("c", "import time; time.sleep(60)", healthy=check, health_interval_s=0.01,
                     health_limit_s=0.02, max_health_failures=2)  # fmt: skip
        supervisor = Supervisor((child,), events)
        await supervisor.start()
        await events.wait(ChildEvent.UNHEALTHY)
        await supervisor.stop()


async def test_a_late_child_is_started_again() -> None:
    events = Events()
    supervisor = Supervisor((spec("c", "import time; time.sleep(60)", ready=no, ready_limit_s=0.1),), events)
    task = asyncio.create_task(supervisor.start())
    await events.wait(ChildEvent.STARTING, 2)
    supervisor.request_stop()
    with pytest.raises(StartError, match="interrupted"):
        await task


async def test_refused_is_final_and_stops_the_others() -> None:
    events = Events()
    first = spec("first", "import time; time.sleep(60)")
    supervisor = Supervisor((first, spec("second", "import sys; sys.exit(78)", ready=no)), events)
    with pytest.raises(StartError, match="'second' could not be started"):
        await supervisor.start()
    assert events.of("second").count(ChildEvent.STARTING) == 1
    assert events.of("first")[-1] == ChildEvent.STOPPED


async def test_a_start_error_before_the_start_is_final_and_says_why() -> None:
    async def refuse() -> None:
        raise ConfigError("the seal is broken")

    supervisor = Supervisor((spec("c", "", before_start=refuse),))
    with pytest.raises(StartError, match="the seal is broken"):
        await supervisor.start()


async def test_a_self_test_that_refuses_is_final() -> None:
    async def ready() -> bool:
        raise ConfigError("renders by itself")

    events = Events()
    supervisor = Supervisor((spec("c", "import time; time.sleep(60)", ready=ready),), events)
    with pytest.raises(StartError, match="renders by itself"):
        await supervisor.start()
    assert events.of("c").count(ChildEvent.STARTING) == 1


async def test_giving_up_ends_the_run() -> None:
    events = Events()
    policy = RestartPolicy(initial_s=0.01, max_s=0.02, stable_s=60, max_restarts=2)
    supervisor = Supervisor((spec("c", "import time; time.sleep(0.1)", restart_policy=policy),), events)
    await supervisor.start()
    assert await supervisor.run() is False
    assert events.of("c").count(ChildEvent.STARTING) == 3
    assert ChildEvent.GAVE_UP in events.of("c")


async def test_what_cannot_be_executed_is_reported() -> None:
    events = Events()
    policy = RestartPolicy(initial_s=0.01, max_s=0.02, max_restarts=1)
    child = ChildSpec("c", ("/no/such/program",), {}, no, restart_policy=policy)
    with pytest.raises(StartError):
        await Supervisor((child,), events).start()


async def test_each_start_inherits_its_own_descriptors(tmp_path: Path) -> None:
    """The key socket: fresh at each start, and closed on our side once the child has it."""
    readers: list[int] = []
    given: list[int] = []

    async def hand_over() -> Handover:
        reader, writer = os.pipe()
        readers.append(reader)
        given.append(writer)
        return Handover({"FD": str(writer)}, (writer,))

    code = "import os, time; fd = int(os.environ['FD']); os.write(fd, b'key'); os.close(fd); time.sleep(60)"
    events = Events()
    supervisor = Supervisor((spec("c", code, before_start=hand_over),), events)
    await supervisor.start()
    os.kill((await events.wait(ChildEvent.READY))["pid"], signal.SIGKILL)
    await events.wait(ChildEvent.READY, 2)
    for reader in readers[1:]:
        assert await asyncio.to_thread(os.read, reader, 10) == b"key"
        assert await asyncio.to_thread(os.read, reader, 10) == b""  # no copy of the writing end is left open
    await supervisor.stop()
    for reader in readers:
        os.close(reader)


async def test_children_have_no_core_files_and_private_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = """if True:
        import os, resource, sys, time
        with open(sys.argv[1] + ".tmp", "w") as file:
            file.write(str(resource.getrlimit(resource.RLIMIT_CORE)))
        os.rename(file.name, sys.argv[1])
        time.sleep(60)
        """
    supervisor = Supervisor((spec("c", code, str(out), ready=exists(out), log_path=tmp_path / "log"),))
    await supervisor.start()
    await supervisor.stop()
    assert out.read_text() == "(0, 0)"
    assert out.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


PARENT = """
import asyncio, json, os, sys
from pathlib import Path
from server.engine.child import ChildSpec
from server.engine.supervisor import Supervisor
from server.engine.tree import tree_members

async def ready():
    return Path(sys.argv[2]).exists()

async def main():
    argv = (sys.executable, "-I", "-S", "-c", sys.argv[1], sys.argv[2])
    supervisor = Supervisor((ChildSpec("c", argv, dict(os.environ), ready, grace_s=2.0),))
    supervisor.handle_signals()
    await supervisor.start()
    process = supervisor.children["c"].process
    print(json.dumps(sorted(tree_members(process.pid))), flush=True)
    await supervisor.run()

asyncio.run(main())
"""
# Each spawned process does what vLLM's do through `entry.py`.
TIED = """
import ctypes, os, subprocess, sys, time
tie = "import ctypes, sys, time; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); open(sys.argv[1], 'w'); time.sleep(60)"
subprocess.Popen([sys.executable, "-I", "-S", "-c", tie, sys.argv[1]])
time.sleep(60)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_supervisor(tmp_path: Path, signum: signal.Signals) -> None:
    command = [sys.executable, "-c", PARENT, TIED, str(tmp_path / "f")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    with parent.stdout:
        tree = [int(pid) for pid in parent.stdout.readline().strip("[]\n").split(",")]
    assert len(tree) == 2
    parent.send_signal(signum)
    assert parent.wait(10) == (-signum if signum == signal.SIGKILL else 0)
    end_s = time.monotonic() + 5
    while any(is_alive(pid) for pid in tree) and time.monotonic() < end_s:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        assert not [pid for pid in tree if is_alive(pid)]


def test_back_off_grows_to_its_cap_and_is_spread() -> None:
    policy = RestartPolicy(initial_s=1, max_s=8)
    assert [policy.delay_s(n, jitter=1.0) for n in (1, 2, 3, 4, 5, 5000)] == [1, 2, 4, 8, 8, 8]
    assert policy.delay_s(1, jitter=0.0) == 0.5
