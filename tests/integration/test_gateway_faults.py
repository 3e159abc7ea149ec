"""What breaks while requests run: clients leave, engines and writers die, the server stops; and what is on record."""

import json
import signal
import socket
import threading
import time

import httpx
import pytest

from benchmarks.gateway.kit import MODEL, wait_until
from server.audit.verify import Verifier

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def kit(make_gateway):
    kit = make_gateway()
    kit.start()
    kit.key = kit.new_key(groups={"developers"})
    kit.wait_for_key(kit.key)
    return kit


def chat(kit, **body):
    return httpx.post(
        kit.base + "/v1/chat/completions",
        json={**CHAT, **body},
        headers={"authorization": f"Bearer {kit.key}"},
        timeout=20,
    )


def raw_request(kit, body, *, path="/v1/chat/completions"):
    """A socket on which a whole request has been sent and nothing was read."""
    sock = socket.create_connection(("127.0.0.1", kit.settings.public.port))
    data = json.dumps(body).encode()
    sock.sendall(
        f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {kit.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return sock


def read_until(sock, mark):
    """What arrives up to `mark`, and whatever comes with it."""
    sock.settimeout(20)
    data = b""
    while mark not in data:
        piece = sock.recv(65536)
        assert piece, f"the connection ended before {mark!r}"
        data += piece
    return data


def outcomes(kit):
    return [entry["outcome"] for entry in kit.entries() if entry["event"] == "gateway:request:finished"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_engine_and_is_on_record(kit, stream):
    kit.control(delay_ms=50, num_tokens=400)
    sock = raw_request(kit, {**CHAT, "stream": stream})
    wait_until(lambda: kit.stats()["running"] == 1)
    sock.close()
    wait_until(lambda: kit.stats()["running"] == 0, limit_s=2)
    wait_until(lambda: outcomes(kit) == ["aborted"], limit_s=2)


def test_a_client_that_never_reads_is_given_up(kit):
    kit.control(num_tokens=2000, text="word " * 3_000_000)
    sock = raw_request(kit, {**CHAT, "stream": True, "max_tokens": 3000})
    try:
        wait_until(lambda: outcomes(kit) == ["aborted"], limit_s=15)
        assert kit.stats()["running"] == 0
    finally:
        sock.close()
    kit.control(num_tokens=4)
    assert chat(kit).status_code == 200


def test_slow_heads_and_bodies_are_cut_off(kit):
    port = kit.settings.public.port
    head = socket.create_connection(("127.0.0.1", port))
    head.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost:")
    silent = socket.create_connection(("127.0.0.1", port))
    body = socket.create_connection(("127.0.0.1", port))
    body.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {kit.key}\r\n"
        "content-type: application/json\r\ncontent-length: 100\r\n\r\n{".encode()
    )
    for sock in (head, silent):
        sock.settimeout(5)
        assert sock.recv(1000) == b""
    body.settimeout(8)
    assert b" 408 " in body.recv(1000)
    for sock in (head, silent, body):
        sock.close()


def test_a_dead_engine_gives_503_and_comes_back(kit):
    kit.control(delay_ms=20, num_tokens=500)
    result = {}

    def stream():
        response = chat(kit, stream=True)
        result["text"] = response.text

    thread = threading.Thread(target=stream)
    thread.start()
    wait_until(lambda: kit.stats()["running"] == 1)
    time.sleep(0.2)
    kit.kill(f"engine-{MODEL}")
    thread.join(10)
    events = [line[6:] for line in result["text"].splitlines() if line.startswith("data: ")]
    assert json.loads(events[-1])["error"]["code"] in ("engine_error", "engine_unavailable")
    assert "[DONE]" not in result["text"]
    response = chat(kit)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    wait_until(lambda: httpx.get(kit.base + "/readyz").status_code == 503, limit_s=3)
    assert httpx.get(kit.base + "/livez").status_code == 200
    kit.start_engine(MODEL)
    wait_until(lambda: chat(kit).status_code == 200)
    assert "failed" in outcomes(kit)


def test_a_dead_writer_gives_503_and_nothing_reaches_the_engine(kit):
    assert chat(kit).status_code == 200
    before = kit.stats()["finished"]
    kit.kill("writer")
    response = chat(kit)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "audit_unavailable"
    assert "retry-after" in response.headers
    assert kit.stats()["finished"] == before
    kit.start_writer()
    wait_until(lambda: chat(kit).status_code == 200)


def test_a_writer_that_dies_mid_stream_ends_the_stream_with_an_error(kit):
    kit.control(delay_ms=20, num_tokens=100)
    lines = []
    body = {**CHAT, "stream": True}
    with httpx.stream(
        "POST", kit.base + "/v1/chat/completions", json=body, headers={"authorization": f"Bearer {kit.key}"}, timeout=20
    ) as response:
        for line in response.iter_lines():
            lines.append(line)
            if len(lines) == 20:
                kit.kill("writer")
    events = [line[6:] for line in lines if line.startswith("data: ")]
    assert json.loads(events[-1])["error"]["code"] == "audit_unavailable"
    assert not any('"finish_reason":"stop"' in event for event in events)


@pytest.fixture
def stopped_writer(kit):
    """The log's writer, held still from `send_signal(SIGSTOP)` on until the test ends."""
    yield kit.processes["writer"]
    kit.processes["writer"].send_signal(signal.SIGCONT)


def test_nothing_reaches_the_engine_while_the_log_stands_still(kit, stopped_writer):
    before = kit.stats()
    stopped_writer.send_signal(signal.SIGSTOP)
    sock = raw_request(kit, {**CHAT, "stream": True})
    time.sleep(0.5)
    assert kit.stats() == before
    stopped_writer.send_signal(signal.SIGCONT)
    sock.settimeout(10)
    assert sock.recv(65536).startswith(b"HTTP/1.1 200")
    sock.close()


def test_a_log_that_stands_still_holds_back_the_end_of_an_answer_and_not_its_text(kit, stopped_writer):
    kit.control(first_delay_ms=300, text="All of it.", num_tokens=10)  # its tokens are characters
    sock = raw_request(kit, {**CHAT, "stream": True})
    wait_until(lambda: kit.stats()["running"] == 1)
    stopped_writer.send_signal(signal.SIGSTOP)
    data = read_until(sock, b'"content":"."')
    data += read_until(sock, b'"delta":{}')  # a heartbeat: nothing else came for a second
    assert b'"finish_reason":"' not in data
    assert outcomes(kit) == []
    stopped_writer.send_signal(signal.SIGCONT)
    assert b'"finish_reason":"stop"' in read_until(sock, b"[DONE]")
    sock.close()
    assert outcomes(kit) == ["completed"]


def test_a_client_that_leaves_before_the_outcome_is_durable_leaves_one_record(kit, stopped_writer):
    kit.control(first_delay_ms=300, text="All of it.", num_tokens=10)  # its tokens are characters
    sock = raw_request(kit, {**CHAT, "stream": True})
    wait_until(lambda: kit.stats()["running"] == 1)
    stopped_writer.send_signal(signal.SIGSTOP)
    read_until(sock, b'"content":"."')
    sock.close()
    time.sleep(0.2)
    stopped_writer.send_signal(signal.SIGCONT)
    wait_until(lambda: outcomes(kit) == ["completed"], limit_s=5)
    assert chat(kit).status_code == 200
    assert outcomes(kit) == ["completed", "completed"]


def test_a_killed_gateway_leaves_a_log_that_verifies_and_holds_every_answer(kit):
    answered = []
    stop = threading.Event()

    def ask():
        with httpx.Client(headers={"authorization": f"Bearer {kit.key}"}, timeout=5) as client:
            while not stop.is_set():
                try:
                    response = client.post(kit.base + "/v1/chat/completions", json=CHAT)
                except httpx.HTTPError:
                    return
                if response.status_code == 200:
                    answered.append(response.headers["x-request-id"])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(answered) > 100)
    kit.kill("gateway")
    stop.set()
    for thread in threads:
        thread.join()
    wait_until(lambda: "unknown" in outcomes(kit) or len(outcomes(kit)) >= len(answered))
    finished = {e["request_id"] for e in kit.entries() if e["event"] == "gateway:request:finished"}
    assert set(answered) <= finished
    accepted = {e["request_id"] for e in kit.entries() if e["event"] == "gateway:request:accepted"}
    wait_until(lambda: accepted <= {e["request_id"] for e in kit.entries() if e["event"] == "gateway:request:finished"})
    time.sleep(0.5)
    Verifier(kit.settings.audit_dir).verify()
    kit.start_gateway()
    assert chat(kit).status_code == 200


def test_a_revoked_key_ends_its_running_stream(kit):
    from server.auth.key_admin import KeyAdmin
    from server.auth.pepper import load_pepper
    from server.store.database import Store

    kit.control(delay_ms=50, num_tokens=1000)
    result = {}

    def stream():
        result["text"] = chat(kit, stream=True).text

    thread = threading.Thread(target=stream)
    thread.start()
    wait_until(lambda: kit.stats()["running"] == 1)
    store = Store.open(kit.settings.store_url)
    try:
        admin = KeyAdmin(store, load_pepper(kit.settings.keys_dir / "pepper"), record=lambda *_a, **_k: None, by="t")
        admin.revoke(kit.key.split("_")[1], reason="test")
    finally:
        store.close()
    thread.join(6)
    assert not thread.is_alive()
    assert '"invalid_api_key"' in result["text"]
    assert chat(kit).status_code == 401


def test_a_stop_lets_answers_end_and_refuses_new_ones(kit):
    kit.control(delay_ms=20, num_tokens=40)
    result = {}

    def stream():
        result["response"] = chat(kit, stream=True)

    thread = threading.Thread(target=stream)
    thread.start()
    wait_until(lambda: kit.stats()["running"] == 1)
    kit.processes["gateway"].terminate()
    wait_until(lambda: httpx.get(kit.base + "/readyz").status_code == 503, limit_s=2)
    assert chat(kit).status_code == 503
    thread.join(10)
    assert result["response"].text.rstrip().endswith("[DONE]")
    assert kit.processes["gateway"].wait(15) == 0


def test_a_stop_ends_long_answers_with_an_error_event(kit):
    kit.control(delay_ms=50, num_tokens=2000)
    result = {}

    def stream():
        result["response"] = chat(kit, stream=True)

    thread = threading.Thread(target=stream)
    thread.start()
    wait_until(lambda: kit.stats()["running"] == 1)
    kit.processes["gateway"].terminate()
    thread.join(10)
    events = [line[6:] for line in result["response"].text.splitlines() if line.startswith("data: ")]
    assert json.loads(events[-1])["error"]["code"] == "service_unavailable"
    assert kit.processes["gateway"].wait(15) == 0


def test_a_silent_engine_brings_heartbeats_that_parse(kit):
    kit.control(hang_after=2, num_tokens=10)
    sock = raw_request(kit, {**CHAT, "stream": True})
    sock.settimeout(6)
    data = b""
    end_s = time.monotonic() + 4
    while data.count(b'"delta":{}') < 2 and time.monotonic() < end_s:
        data += sock.recv(65536)
    sock.close()
    assert data.count(b'"delta":{}') >= 2
    for line in data.split(b"\n"):
        if line.startswith(b"data: "):
            json.loads(line[6:])


def test_a_start_and_a_scanner_that_fails_are_on_record(make_gateway):
    kit = make_gateway(guard={"scan_timeout_ms": 1})
    kit.start()
    kit.key = kit.new_key(groups={"developers"})
    kit.wait_for_key(kit.key)
    (configured,) = [entry for entry in kit.entries() if entry["event"] == "gateway:service:configured"]
    assert {model["id"] for model in configured["models"]} == {model.id for model in kit.settings.models}
    lines = "".join(f"def f{at}(a):\n    return eval(a) + {at}\n" for at in range(60))
    kit.control(text=f"```python\n{lines}```\n", num_tokens=100)
    accepted = chat(kit)
    assert accepted.status_code == 200
    entry = next(e for e in kit.entries() if e["event"] == "gateway:request:accepted")
    assert entry["policy"]["digest"] == configured["policy"]
    wait_until(lambda: any(e["event"] == "guard:scanner:failed" and e["timeout"] >= 1 for e in kit.entries()))
    finished = next(e for e in kit.entries() if e["event"] == "gateway:request:finished")
    assert finished["scan_output"]["state"] == "unscanned"
