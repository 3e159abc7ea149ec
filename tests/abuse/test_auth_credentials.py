"""Attacks on credentials (AU-03, AU-04, AU-08 to AU-12, AU-14): what is wrong is refused alike, at every route."""

import itertools
import math
import random
import secrets
import statistics
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.gateway.kit import MODEL, make_kit, wait_until
from server.api.public import MODEL_ROUTES
from server.auth.api_key import KeyRing, new_key
from server.auth.pepper import Pepper, load_pepper
from server.cli import main
from server.errors import AuthenticationError, ConfigError
from server.store.database import Store
from server.store.keys import KeyRow, list_keys, revoke_key

ROUTES = [route for route, _ in MODEL_ROUTES]
FORMS = ("authorization", "x-api-key", "api-key")


def headers_of(key, form="authorization"):
    return {form: f"Bearer {key}" if form == "authorization" else key}


_addresses = itertools.count(10)


def ask(gateway, method, path, headers, **changes):
    """One request from an address of its own: failures of one test must not throttle another."""
    number = next(_addresses)
    transport = httpx.HTTPTransport(local_address=f"127.1.{number >> 8}.{number & 255}")
    with httpx.Client(transport=transport, timeout=20) as client:
        return client.request(method, gateway.base + path, headers=headers, **changes)


def post(gateway, route, key, form="authorization"):
    return ask(gateway, "POST", route, headers_of(key, form), json={"model": MODEL})


def models(gateway, key):
    return ask(gateway, "GET", "/v1/models", headers_of(key))


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with make_kit(tmp_path_factory.mktemp("gw")) as kit:
        yield kit


@pytest.fixture(scope="module")
def key(gateway):
    return gateway.working_key(groups={"developers"})


@pytest.fixture(scope="module")
def dead_keys(gateway):
    """Keys that were good once, or are good for something else."""
    expired = gateway.new_key(groups={"developers"}, subject="expired", expires_at_s=time.time() + 3)
    revoked = gateway.new_key(groups={"developers"}, subject="revoked")
    for key in (expired, revoked):
        gateway.wait_for_key(key)
    store = Store.open(gateway.settings.store_url)
    with store.write() as connection:
        row = next(row for row in list_keys(connection) if row.subject == "revoked")
        revoke_key(connection, row.id, reason="test", at_s=time.time())
    store.close()
    for key in (expired, revoked):
        wait_until(lambda key=key: models(gateway, key).status_code == 401, limit_s=5)
    return {"expired": expired, "revoked": revoked, "unknown": new_key(Pepper({1: bytes(range(32))})).text.reveal()}


@pytest.mark.parametrize("route", ROUTES)
def test_dead_keys_are_refused_alike_in_every_header(gateway, dead_keys, route):
    bodies = set()
    for key in dead_keys.values():
        for form in FORMS:
            answer = post(gateway, route, key, form)
            assert answer.status_code == 401, answer.text
            bodies.add(answer.text.replace(answer.headers["x-request-id"], ""))
    assert len(bodies) == 1


@pytest.mark.parametrize(
    "value",
    [
        "'",
        '"',
        "' OR 1=1 --",
        "%00",
        "sr_",
        "sr_aaaaaaaaaaaa_",
        "a.b.c",
        "x" * 8000,
        "..",
        "undefined",
        "sr_" + "a" * 56,
    ],
    ids=lambda value: value[:12],
)
def test_hostile_credentials_are_a_quick_401(gateway, value):
    for form in FORMS:
        begin_s = time.perf_counter()
        answer = post(gateway, "/v1/chat/completions", value, form)
        assert answer.status_code == 401
        assert time.perf_counter() - begin_s < 30
        assert value[:40] not in answer.text or len(value) < 3


@pytest.mark.parametrize("raw", [b"\xff\xfe\xfd", "ключ".encode(), b"sr_\xf0\x9f\x94\x91", b"\x01\x02"])
def test_bytes_that_are_no_text_are_refused(gateway, raw):
    headers = [(b"authorization", b"Bearer " + raw)]
    assert ask(gateway, "POST", "/v1/chat/completions", headers, json={"model": MODEL}).status_code in (400, 401)


def test_a_hundred_wrong_keys_are_throttled_and_another_address_is_not(gateway, key):
    before = len(gateway.entries())
    with (
        httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.9"), base_url=gateway.base) as attacker,
        httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.8"), base_url=gateway.base) as other,
    ):
        answers = [attacker.get("/v1/models", headers=headers_of(f"wrong-number-{number}")) for number in range(100)]
        codes = [answer.status_code for answer in answers]
        assert codes[0] == 401
        assert 429 in codes[:99]
        assert int(answers[codes.index(429)].headers["retry-after"]) >= 1
        refused = [entry for entry in gateway.entries()[before:] if entry["event"] == "gateway:credential:refused"]
        assert len(refused) >= codes.count(401)
        assert "wrong-number" not in str(gateway.entries())
        assert other.get("/v1/models", headers=headers_of(key)).status_code == 200
        assert other.get("/v1/models", headers=headers_of("wrong")).status_code == 401
        # A key of ours can't be guessed, so its owner behind the attacker's address works on.
        assert attacker.get("/v1/models", headers=headers_of(key)).status_code == 200


FLOODS = [
    ("/v1/chat/completions", {}, "throttled, no credential"),
    ("/v1/chat/completions", headers_of("wrong"), "throttled"),
    ("/v1/models", {}, "throttled, no credential"),
    ("/v1/models", headers_of("wrong"), "throttled"),
]


def test_a_flood_without_a_valid_key_does_not_fill_the_log(gateway, key):
    before = len(gateway.entries())
    floods = []
    for path, headers, reason in FLOODS:
        number = next(_addresses)
        address = f"127.2.{number >> 8}.{number & 255}"
        method = "GET" if path == "/v1/models" else "POST"
        transport = httpx.HTTPTransport(local_address=address)
        with httpx.Client(transport=transport, base_url=gateway.base, timeout=20) as flood:
            body = {"model": MODEL}
            codes = [flood.request(method, path, headers=headers, json=body).status_code for _ in range(750)]
            assert set(codes) == {401, 429}, (path, reason)
            assert codes[-1] == 429, (path, reason)
            assert flood.get("/v1/models", headers=headers_of(key)).status_code == 200, (path, reason)
        floods.append((address, reason, codes))

    def seen(address):
        return [entry for entry in gateway.entries()[before:] if address in str(entry)]

    def sum_of(address, reason):
        return sum(entry["num_failures"] for entry in seen(address) if entry.get("reason") == reason)

    for address, reason, codes in floods:
        wait_until(lambda: sum_of(address, reason) >= codes.count(429), limit_s=60, pause_s=0.5)  # noqa: B023
        assert sum_of(address, reason) == codes.count(429)
        assert len(seen(address)) <= codes.count(401) + 5  # the sums, and the key's own


def rank_test(first, second):
    """The two-sided p of Mann and Whitney's rank test, by its normal approximation; equal values are ranked by lot."""
    lots = random.Random(1)  # noqa: S311 - ties are broken by lot
    marked = sorted([(value, lots.random(), 0) for value in first] + [(value, lots.random(), 1) for value in second])
    rank_sum = sum(rank for rank, (_value, _lot, side) in enumerate(marked, start=1) if side == 0)
    centre = len(first) * (len(first) + len(second) + 1) / 2
    deviation = math.sqrt(len(first) * len(second) * (len(first) + len(second) + 1) / 12)
    return math.erfc(abs(rank_sum - centre) / deviation / math.sqrt(2))


def test_keys_that_begin_alike_are_told_apart_in_the_same_time():
    """AU-04: no difference by how much of a key is right; 2,000 of each kind, mixed, under a rank test.

    A true difference shows in every run, chance in one of a thousand: it is one only if three runs see it. The control,
    which compares letter by letter, shows that the test can see one.
    """
    pepper = Pepper({1: bytes(range(32))})
    good = new_key(pepper)
    ring = KeyRing(pepper)
    ring.load([
        KeyRow(good.id, good.digest, 1, "ana", "acme", frozenset(), frozenset({"*"}), "", 1.0, "test")
    ])  # fmt: skip
    text = good.text.reveal()
    order = random.Random(7)  # noqa: S311 - an order drawn by lot

    def offer(num_right):
        letters = "".join(secrets.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(len(text)))
        # The id stays right, so that every offer comes to the comparison; what is counted is letters of the secret.
        head = len(text) - 43 + num_right
        return text[:head] + letters[head:]

    def careless(offered):
        for one, other in zip(offered, text, strict=True):
            if one != other:
                raise AuthenticationError("wrong secret")

    def measure(check):
        """Nanoseconds of 2,000 refusals of each kind, in an order drawn by lot."""
        taken: dict[int, list[int]] = {0: [], 16: [], 42: []}
        kinds = [kind for kind in taken for _ in range(2000)]
        order.shuffle(kinds)
        for kind in kinds:
            offered = offer(kind)
            if offered == text:
                continue
            begin_ns = time.perf_counter_ns()
            try:
                check(offered)
            except AuthenticationError:
                taken[kind].append(time.perf_counter_ns() - begin_ns)
        return taken

    def differs(check):
        taken = measure(check)
        return min(rank_test(taken[0], taken[16]), rank_test(taken[0], taken[42])) < 0.001

    assert differs(careless)
    assert not all(differs(ring.authenticate) for _ in range(3))
    medians_us = [statistics.median(values) / 1000 for values in measure(ring.authenticate).values()]
    assert max(medians_us) - min(medians_us) < 5, medians_us


def test_an_unknown_id_takes_as_long_as_a_wrong_secret():
    """AU-04: one digest and one comparison either way."""
    pepper = Pepper({1: bytes(range(32))})
    good = new_key(pepper)
    ring = KeyRing(pepper)
    ring.load([KeyRow(good.id, good.digest, 1, "a", "t", frozenset(), frozenset({"*"}), "", 1.0, "test")])
    secret = "a" * 43
    kinds = {"unknown": lambda: f"sr_{secrets.token_hex(6)}_{secret}", "wrong": lambda: f"sr_{good.id}_{secret}"}
    taken: dict[str, list[int]] = {kind: [] for kind in kinds}
    for _ in range(2000):
        for kind, make in kinds.items():
            offered = make()
            begin_ns = time.perf_counter_ns()
            try:
                ring.authenticate(offered)
            except AuthenticationError:
                taken[kind].append(time.perf_counter_ns() - begin_ns)
    medians_us = [statistics.median(values) / 1000 for values in taken.values()]
    assert max(medians_us) - min(medians_us) < 5, medians_us


def test_two_keys_of_one_beginning_are_two_keys(gateway, key):
    """AU-08: nothing is remembered by a prefix."""
    assert models(gateway, key).status_code == 200
    twin = key[:20] + "".join("a" if letter != "a" else "b" for letter in key[20:])
    assert models(gateway, twin).status_code == 401
    assert models(gateway, key[:-1]).status_code == 401
    assert models(gateway, key + "a").status_code == 401
    assert models(gateway, key.upper()).status_code == 401


@pytest.mark.parametrize("content", ["", "1 " + "00" * 32])
def test_a_server_with_a_weak_pepper_does_not_start(tmp_path, content):
    gateway = make_kit(tmp_path / "gw")
    path = gateway.settings.keys_dir / "pepper"
    path.chmod(0o600)
    path.write_text(content)
    with pytest.raises(ConfigError):
        load_pepper(path)
    resolved = gateway.state / "settings.json"
    resolved.write_text(gateway.settings.model_dump_json())
    try:
        gateway._spawn("gateway", "-m", "server.gateway", "--settings", str(resolved))
        assert gateway.processes["gateway"].wait(60) == 78
    finally:
        gateway.stop()
    assert "pepper" in (gateway.state / "logs" / "gateway.log").read_text()


def test_neither_store_nor_log_nor_listing_holds_a_key(gateway, key, capsys):
    """AU-14: the key itself is shown once, at creation, and is nowhere afterwards."""
    secret = key.rsplit("_", 1)[1].encode()
    state = gateway.settings.state
    held = [
        path
        for path in Path(state).rglob("*")
        if path.is_file() and path.suffix not in (".sealed",) and secret in path.read_bytes()
    ]
    assert held == []
    assert main(["keys", "list", "--state", str(state), "--json"]) == 0
    assert secret.decode() not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([], 200),
        ([("x-data-classification", "public")], 200),
        ([("x-data-classification", "restricted")], 403),
        ([("x-data-classification", "nonsense")], 403),
        ([("x-data-classification", "")], 403),
        ([("x-data-classification", "public"), ("x-data-classification", "restricted")], 403),
    ],
)
def test_the_class_of_the_data_is_judged_and_never_guessed(gateway, key, headers, status):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    sent = [("authorization", f"Bearer {key}"), *headers]
    assert ask(gateway, "POST", "/v1/chat/completions", sent, json=body).status_code == status
