"""Completions over real sockets: a newer one ends the stale one, and they never wait behind conversations."""

import json
import threading

import httpx
import pytest

from benchmarks.gateway.kit import MODEL, wait_until

BEFORE = "import os\n" + "".join(f"value_{n} = {n}\n" for n in range(60)) + "def total("
AFTER = "\n\nif __name__ == '__main__':\n    print(total())\n" + "# the end\n" * 20
ROUTES = {
    "/v1/completions": lambda before, after: {"model": MODEL, "prompt": before, "suffix": after},
    "/v1/fim/completions": lambda before, after: {"model": MODEL, "prompt": before, "suffix": after},
    "/infill": lambda before, after: {"model": MODEL, "input_prefix": before, "input_suffix": after},
}


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    from benchmarks.gateway.kit import make_kit

    with make_kit(
        tmp_path_factory.mktemp("typing"), limits={"max_completions": 5, "max_running": 1}, public={"heartbeat_s": 60}
    ) as kit:
        yield kit


@pytest.fixture(scope="module")
def keys(kit):
    return [kit.working_key(groups={"developers"}, subject=name) for name in ("ana", "ben")]


class Stream:
    """A stream in a thread of its own, read to its end."""

    def __init__(self, kit, key, route, body):
        self.lines = []
        self.status = 0
        self.request_id = ""
        self._thread = threading.Thread(target=self._run, args=(kit, key, route, body))
        self._thread.start()

    def _run(self, kit, key, route, body):
        headers = {"authorization": f"Bearer {key}"}
        with httpx.stream("POST", kit.base + route, json={**body, "stream": True}, headers=headers, timeout=60) as got:
            self.status = got.status_code
            self.request_id = got.headers["x-request-id"]
            for line in got.iter_lines():
                self.lines.append(line)

    @property
    def begun(self):
        return sum(line.startswith("data: ") for line in self.lines) > 2

    def join(self):
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self

    @property
    def error(self):
        """The error code of its last event, or of its body; None where it ended well."""
        text = "\n".join(self.lines)
        events = [line[6:] for line in self.lines if line.startswith("data: {")]
        body = json.loads(events[-1] if events else text)
        return body.get("error", {}).get("code")


def slow(kit):
    kit.control(num_tokens=4000, delay_ms=5, separate=True)


def quick(kit):
    kit.control(num_tokens=4)


@pytest.mark.parametrize("route", ROUTES)
def test_a_key_stroke_ends_the_stale_completion_at_once(kit, keys, route):
    slow(kit)
    aborted = kit.stats()["aborted"]
    old = Stream(kit, keys[0], route, ROUTES[route](BEFORE, AFTER))
    wait_until(lambda: old.begun)
    quick(kit)
    new = Stream(kit, keys[0], route, ROUTES[route](BEFORE + "a", AFTER)).join()
    old.join()
    assert old.error == "superseded"
    assert new.error is None
    wait_until(lambda: kit.stats()["aborted"] == aborted + 1, limit_s=2)
    assert kit.stats()["running"] == 0
    finished = next(
        e for e in kit.entries() if e["event"] == "gateway:request:finished" and e["request_id"] == old.request_id
    )
    assert finished["outcome"] == "aborted"


def test_alternatives_other_places_and_other_people_run_on(kit, keys):
    slow(kit)
    make = ROUTES["/v1/completions"]
    streams = [Stream(kit, keys[0], "/v1/completions", make(BEFORE, AFTER)) for _ in range(2)]
    streams.append(Stream(kit, keys[1], "/v1/completions", make(BEFORE + "b", AFTER)))
    wait_until(lambda: all(stream.begun for stream in streams))
    quick(kit)
    elsewhere = Stream(kit, keys[0], "/v1/completions", make(BEFORE[:300], BEFORE[300:] + AFTER)).join()
    assert elsewhere.error is None
    assert kit.stats()["running"] == 3
    for key in keys:
        Stream(kit, key, "/v1/completions", make(BEFORE + "bc", AFTER)).join()
    assert [stream.join().error for stream in streams] == ["superseded"] * 3


def test_one_that_waits_is_ended_with_a_status_and_leaves_the_queue(kit, keys):
    slow(kit)
    make = ROUTES["/v1/completions"]
    busy = [
        Stream(kit, keys[1], "/v1/completions", make(f"# {n}\n" * 200, f"# after {n}\n" * 40)) for n in range(4)
    ]  # a tenant's share
    wait_until(lambda: all(stream.begun for stream in busy))
    typed = [Stream(kit, keys[1], "/v1/completions", make(BEFORE + text, AFTER)) for text in ("", "x")]
    wait_until(lambda: any(stream.status for stream in typed))
    stale = next(stream for stream in typed if stream.status)  # whichever came first
    assert (stale.join().status, stale.error) == (410, "superseded")
    for n in range(4):  # end what keeps the places, by typing there
        quick(kit)
        Stream(kit, keys[1], "/v1/completions", make(f"# {n}\n" * 200 + "y", f"# after {n}\n" * 40)).join()
    for stream in busy:
        assert stream.join().error == "superseded"
    assert [stream.join().error for stream in typed if stream is not stale] == [None]


def test_a_completion_does_not_wait_behind_a_conversation(kit, keys):
    slow(kit)
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    talk = Stream(kit, keys[0], "/v1/chat/completions", chat)
    wait_until(lambda: talk.begun)
    quick(kit)
    assert Stream(kit, keys[0], "/infill", ROUTES["/infill"](BEFORE, AFTER)).join().error is None
    assert kit.stats()["running"] == 1
    kit.kill(f"engine-{MODEL}")
    talk.join()
    kit.start_engine(MODEL)
