"""Tokens of a real OpenID provider (npm oidc-provider): flows, rotation, outage, clocks, and forged tokens."""

import base64
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from server.auth.jwks import ProviderKeys
from server.auth.login import Login
from server.auth.oidc import ClaimRules, OIDCVerifier
from server.cli import main
from server.errors import AuthenticationError, ConfigError, PermissionDeniedError, UnavailableError

NODE = Path(__file__).parents[1] / "node"
AUDIENCE = "https://strongroom.test"
RULES = ClaimRules(audience=AUDIENCE, scope_map={"strongroom.use": ("model:*",), "strongroom.admin": ("admin:*",)})


def new_jwk(kid):
    key = ec.generate_private_key(ec.SECP256R1())
    entry = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key))
    return key, entry | {"kid": kid, "use": "sig", "alg": "ES256"}


class Provider:
    """The provider's process, on a port of its own."""

    def __init__(self, folder):
        if not (NODE / "node_modules" / "oidc-provider").is_dir() or shutil.which("node") is None:
            pytest.fail("The OpenID provider is not installed; run: npm ci --prefix tests/node")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.issuer = f"http://127.0.0.1:{self.port}"
        self.keys_file = folder / "keys.json"
        self.process = None

    def start(self, *keys):
        self.keys_file.write_text(json.dumps({"keys": list(keys)}))
        self.process = subprocess.Popen(
            ["node", "oidc-provider.mjs", str(self.keys_file), str(self.port)],
            cwd=NODE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "NODE_ENV": "test"},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline().decode().strip() == self.issuer

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.process = None

    def post(self, path, auth=None, **form):
        answer = httpx.post(self.issuer + path, data=form, auth=auth, timeout=10)
        answer.raise_for_status()
        return answer.json()

    def robot_token(self, scope="strongroom.use"):
        robot = ("robot", "robot-secret-robot-secret-robot-secret")
        return self.post("/token", robot, grant_type="client_credentials", scope=scope)["access_token"]

    def count(self):
        return httpx.get(self.issuer + "/test/counts", timeout=10).json()["jwks"]


@pytest.fixture(scope="module")
def first_key():
    return new_jwk("first")


@pytest.fixture
def provider(tmp_path, first_key):
    made = Provider(tmp_path)
    made.start(first_key[1])
    yield made
    made.stop()


class Clock:
    """Time that is moved by hand, from now on."""

    def __init__(self):
        self.offset_s = 0.0

    def wall(self):
        return time.time() + self.offset_s

    def steady(self):
        return time.monotonic() + self.offset_s


def new_verifier(provider, clock=None, rules=RULES):
    clock = clock or Clock()
    return OIDCVerifier(ProviderKeys(provider.issuer, clock=clock.steady), rules, clock=clock.wall)


async def test_a_robots_token_is_let_in_with_mapped_claims(provider):
    verifier = new_verifier(provider)
    token = provider.robot_token()
    assert verifier.remembered(token) is None
    principal = await verifier.authenticate(token)
    assert (principal.subject, principal.tenant, principal.method) == ("robot", "acme", "oidc")
    assert principal.groups == {"developers"}
    assert principal.scopes == {"model:*"}
    assert principal.expires_at_s > time.time() + 500
    assert verifier.remembered(token) is principal
    other = await verifier.authenticate(provider.robot_token("strongroom.admin"))
    assert other.scopes == {"admin:*"}
    assert other.credential_id == principal.credential_id


async def test_rotation_at_the_provider_is_followed(provider, first_key):
    clock = Clock()
    verifier = new_verifier(provider, clock)
    old_token = provider.robot_token()
    await verifier.authenticate(old_token)
    provider.stop()
    provider.start(new_jwk("second")[1], first_key[1])
    token = provider.robot_token()
    with pytest.raises(AuthenticationError):
        await verifier.authenticate(token)  # within the cooldown the provider is not asked again
    clock.offset_s += 31
    assert (await verifier.authenticate(token)).subject == "robot"
    assert (await verifier.authenticate(old_token)).subject == "robot"


async def test_known_keys_work_while_the_provider_is_down(provider):
    clock = Clock()
    verifier = new_verifier(provider, clock)
    token = provider.robot_token()
    await verifier.authenticate(token)
    later = provider.robot_token("strongroom.admin")
    provider.stop()
    clock.offset_s += 400  # past the refresh, and past what is remembered
    assert verifier.remembered(token) is None
    assert (await verifier.authenticate(later)).subject == "robot"
    assert (await verifier.authenticate(token)).subject == "robot"


async def test_a_provider_that_never_answered_is_503_and_then_recovers(provider, first_key):
    clock = Clock()
    verifier = new_verifier(provider, clock)
    token = provider.robot_token()
    provider.stop()
    for _ in range(2):
        with pytest.raises(UnavailableError):
            await verifier.authenticate(token)
    provider.start(first_key[1])
    clock.offset_s += 31
    assert (await verifier.authenticate(token)).subject == "robot"


async def test_unknown_key_ids_do_not_hammer_the_provider(provider):
    verifier = new_verifier(provider)
    await verifier.authenticate(provider.robot_token())
    before = provider.count()
    key, _jwk = new_jwk("x")
    for number in range(50):
        with pytest.raises(AuthenticationError):
            await verifier.authenticate(forge(provider, key, headers={"kid": f"invented-{number}"}))
    assert provider.count() == before


def forge(provider, key, algorithm="ES256", headers=None, **changes):
    now = int(time.time())
    claims = {
        "iss": provider.issuer, "aud": AUDIENCE, "sub": "ana", "exp": now + 60, "iat": now, "tenant": "acme",
        "groups": ["security"], "scope": "strongroom.admin", "client_id": "robot",
    } | changes  # fmt: skip
    claims = {name: value for name, value in claims.items() if value is not None}
    return jwt.encode(claims, key, algorithm=algorithm, headers={"typ": "at+jwt", "kid": "first"} | (headers or {}))


async def test_a_token_of_the_providers_own_key_is_the_control(provider, first_key):
    assert (await new_verifier(provider).authenticate(forge(provider, first_key[0]))).subject == "ana"


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": "https://elsewhere.test"}, {"aud": None}, {"iss": "https://evil.test"}, {"iss": None}, {"sub": None},
        {"exp": None}, {"exp": 1}, {"iat": None}, {"nbf": 9_999_999_999}, {"iat": 9_999_999_999}, {"tenant": None},
        {"tenant": "a/b"}, {"sub": "../root"}, {"sub": ""}, {"tenant": ["acme"]},
        {"headers": {"kid": "../../etc/passwd"}}, {"headers": {"typ": "JWT"}}, {"headers": {"typ": "id+jwt"}},
        {"headers": {"crit": ["x"], "x": 1}},
    ],
    ids=str,
)  # fmt: skip
async def test_wrong_claims_and_headers_are_refused(provider, first_key, changes):
    with pytest.raises(AuthenticationError):
        await new_verifier(provider).authenticate(forge(provider, first_key[0], **changes))


async def test_forged_signatures_are_refused(provider, first_key):
    verifier = new_verifier(provider)
    good = forge(provider, first_key[0])
    await verifier.authenticate(good)
    head, body, signature = good.split(".")
    public = (
        first_key[0]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    none = base64.urlsafe_b64encode(b'{"alg":"none","typ":"at+jwt","kid":"first"}').rstrip(b"=").decode()
    rs256 = rsa.generate_private_key(65537, 2048)
    import hashlib
    import hmac

    hs_head = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"at+jwt","kid":"first"}').rstrip(b"=").decode()
    mac = hmac.new(public, f"{hs_head}.{body}".encode(), hashlib.sha256).digest()
    changed = json.loads(base64.urlsafe_b64decode(body + "=="))
    changed["tenant"] = "zeta"
    changed_body = base64.urlsafe_b64encode(json.dumps(changed).encode()).rstrip(b"=").decode()
    forged = {
        "alg none": f"{none}.{body}.",
        "alg none, signature kept": f"{none}.{body}.{signature}",
        "HS256 keyed with the public key": f"{hs_head}.{body}." + base64.urlsafe_b64encode(mac).rstrip(b"=").decode(),
        "another key, same id": forge(provider, new_jwk("first")[0]),
        "RS256 under an EC key's id": forge(provider, rs256, "RS256"),
        "claims changed": f"{head}.{changed_body}.{signature}",
        "signature of another length": good[:-4],
        "last byte changed": good[:-6] + ("A" if good[-6] != "A" else "B") + good[-5:],
        "nothing": "..",
        "not base64": "a.b.c",
    }
    for name, token in forged.items():
        with pytest.raises(AuthenticationError):
            await verifier.authenticate(token)
        assert verifier.remembered(token) is None, name


async def test_an_equal_beginning_is_not_an_equal_token(provider, first_key):
    """AU-08: what is remembered is found by the digest of the whole token."""
    verifier = new_verifier(provider)
    good = forge(provider, first_key[0])
    await verifier.authenticate(good)
    twin = good.rsplit(".", 1)[0] + "." + "A" * len(good.rsplit(".", 1)[1])
    with pytest.raises(AuthenticationError):
        await verifier.authenticate(twin)


@pytest.mark.parametrize(("offset_s", "is_valid"), [(0, True), (110, True), (121, False), (-59, True), (-90, False)])
async def test_clocks_may_be_a_minute_apart(provider, first_key, offset_s, is_valid):
    clock = Clock()
    clock.offset_s = offset_s
    verifier = new_verifier(provider, clock)
    token = forge(provider, first_key[0])
    if is_valid:
        assert (await verifier.authenticate(token)).subject == "ana"
    else:
        with pytest.raises(AuthenticationError):
            await verifier.authenticate(token)


async def test_a_token_ends_with_its_expiry_though_it_is_remembered(provider, first_key):
    clock = Clock()
    verifier = new_verifier(provider, clock)
    token = forge(provider, first_key[0])
    await verifier.authenticate(token)
    clock.offset_s += 121
    assert verifier.remembered(token) is None
    with pytest.raises(AuthenticationError):
        await verifier.authenticate(token)


async def test_groups_and_tenants_can_be_mapped(provider, first_key):
    rules = ClaimRules(
        audience=AUDIENCE, group_map={"/eng/devs": "developers"}, default_tenant="house",
        scope_map={"a": ("model:*",), "b": ("guard:text:scan",)},
    )  # fmt: skip
    token = forge(
        provider, first_key[0], tenant=None, groups=["/eng/devs", "leads", "/not/a/name", 7], scope=["a", "b", "c"]
    )
    principal = await new_verifier(provider, rules=rules).authenticate(token)
    assert principal.tenant == "house"
    assert principal.groups == {"developers", "leads", "7"}
    assert principal.scopes == {"model:*", "guard:text:scan"}


@pytest.mark.parametrize(
    "rules",
    [{"audience": ""}, {"algorithms": frozenset({"HS256"})}, {"algorithms": frozenset({"none"})},
     {"algorithms": frozenset()}, {"leeway_s": 301}],
)  # fmt: skip
def test_weak_rules_are_refused(rules):
    with pytest.raises(ConfigError):
        ClaimRules(**({"audience": "a"} | rules))


@pytest.mark.parametrize(
    "url", ["http://idp.example", "ftp://idp.example", "file:///etc/passwd", "idp", "http://localhost.evil"]
)
def test_a_provider_without_tls_is_refused(url):
    with pytest.raises(ConfigError):
        ProviderKeys(url)


async def test_a_provider_that_calls_itself_otherwise_is_refused(provider):
    keys = ProviderKeys(f"http://127.0.0.1:{provider.port}/")
    with pytest.raises(UnavailableError, match="calls itself otherwise"):
        keys.fetch()


def log_in(provider, tmp_path, *arguments):
    file = ["--file", str(tmp_path / "home" / "token.json"), "--issuer", provider.issuer]
    return main(["login", *file, *arguments])


async def test_a_robot_logs_in_by_its_secret(provider, tmp_path, capsys, monkeypatch):
    robot = ["--robot", "--client-id", "robot", "--scope", "strongroom.use", "--print"]
    monkeypatch.delenv("STRONGROOM_CLIENT_SECRET", raising=False)
    assert log_in(provider, tmp_path, *robot) == 1
    monkeypatch.setenv("STRONGROOM_CLIENT_SECRET", "wrong")
    assert log_in(provider, tmp_path, *robot) == 1
    assert "invalid_client" in capsys.readouterr().err
    monkeypatch.setenv("STRONGROOM_CLIENT_SECRET", "robot-secret-robot-secret-robot-secret")
    assert log_in(provider, tmp_path, *robot) == 0
    token = capsys.readouterr().out.strip()
    assert (await new_verifier(provider).authenticate(token)).subject == "robot"
    assert log_in(provider, tmp_path, *robot) == 0
    assert capsys.readouterr().out.strip() == token
    assert (tmp_path / "home" / "token.json").stat().st_mode & 0o777 == 0o600


async def test_a_person_logs_in_on_another_screen_and_the_token_is_renewed(provider, tmp_path):
    waited = []

    def approve_while_waiting(seconds):
        waited.append(seconds)
        provider.post(f"/test/approve?user_code={shown[1]}")

    shown: list[str] = []
    clock = Clock()
    login = Login(
        provider.issuer, "ide", scope="openid offline_access strongroom.use", clock=clock.wall,
        sleep=approve_while_waiting,
    )  # fmt: skip
    tokens = login.as_person(lambda *told: shown.extend(told))
    assert shown[0].startswith(provider.issuer)
    assert len(waited) == 1
    verifier = new_verifier(provider)
    principal = await verifier.authenticate(tokens.access_token)
    assert (principal.subject, principal.scopes) == ("ana", {"model:*"})
    assert tokens.refresh_token is not None
    renewed = login.renew(tokens.refresh_token)
    assert renewed.access_token != tokens.access_token
    assert (await verifier.authenticate(renewed.access_token)).subject == "ana"
    assert tokens.access_token not in repr(tokens)
    with pytest.raises(PermissionDeniedError):
        login.renew("invented")


def test_a_login_that_nobody_approves_ends(provider):
    clock = Clock()

    def sleep(seconds):
        clock.offset_s += seconds + 30

    login = Login(provider.issuer, "ide", scope="openid strongroom.use", clock=clock.wall, sleep=sleep)
    with pytest.raises(PermissionDeniedError):
        login.as_person(lambda _url, _code: None)


def test_a_login_without_a_provider_is_one_clear_line(tmp_path, capsys):
    assert main(["login", "--file", str(tmp_path / "t.json")]) == 1
    assert main(["login", "--file", str(tmp_path / "t.json"), "--issuer", "http://evil.test", "--client-id", "x"]) == 1
    assert capsys.readouterr().err.count("\n") == 2
    (tmp_path / "t.json").write_text("{}")
    assert main(["login", "--file", str(tmp_path / "t.json"), "--print"]) == 1
    (tmp_path / "t.json").chmod(0o600)
    assert main(["login", "--file", str(tmp_path / "t.json"), "--print"]) == 1
    err = capsys.readouterr().err
    assert "chmod 600" in err
    assert "damaged" in err


def test_a_gateway_serves_tokens_of_the_provider_and_refuses_forged_ones(provider, first_key, make_gateway):
    kit = make_gateway(
        oidc={
            "issuer": provider.issuer,
            "audience": AUDIENCE,
            "scope_map": {"strongroom.use": ["model:*"]},
        }
    )
    kit.start()

    def chat(token):
        return httpx.post(
            kit.base + "/v1/chat/completions", headers={"authorization": f"Bearer {token}"}, timeout=30,
            json={"model": "default", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
        )  # fmt: skip

    answer = chat(provider.robot_token())
    assert answer.status_code == 200, answer.text
    accepted = next(entry for entry in kit.entries() if entry.get("request_id") == answer.headers["x-request-id"])
    assert "robot" in str(accepted)
    assert chat(provider.robot_token("strongroom.admin")).status_code == 403
    assert chat(forge(provider, new_jwk("first")[0])).status_code == 401
    assert chat(forge(provider, first_key[0], scope="strongroom.use", groups=["visitors"])).status_code == 403
    assert chat(forge(provider, first_key[0], scope="strongroom.use", groups=["developers"])).status_code == 200
