"""Every route against every kind of credential and all that can be wrong with one (AU-01 to AU-03, AU-13, AZ-02).

A route without a row in `ROUTES` fails here, and so does a fault that some route takes for a valid credential.
"""

import contextlib
import datetime
import http.client
import http.server
import itertools
import json
import ssl
import threading
import time
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple, cast

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from typing_extensions import override

from benchmarks.gateway.kit import EMBEDDER, MODEL, GatewayKit, make_kit
from server.api.admin import AdminDeps, build_admin
from server.api.admin_identity import identity_router
from server.api.edge import Edge
from server.api.public import MODEL_ROUTES, PublicDeps, build_public
from server.store.database import Store
from server.store.incidents import Quarantined, open_incident
from server.store.keys import list_keys, revoke_key

AUDIENCE = "https://strongroom.test"
TURNS = [{"role": "user", "content": "hi"}]
OPEN = {("GET", "/livez"), ("GET", "/readyz"), ("HEAD", "/")}
"""Answered to anybody, and empty of data."""

ROUTES: dict[tuple[str, str], dict[str, Any] | None] = {
    ("POST", "/v1/chat/completions"): {"model": MODEL, "messages": TURNS},
    ("POST", "/v1/completions"): {"model": MODEL, "prompt": "def f():"},
    ("POST", "/v1/responses"): {"model": MODEL, "input": "hi"},
    ("POST", "/v1/messages"): {"model": MODEL, "max_tokens": 8, "messages": TURNS},
    ("POST", "/v1/embeddings"): {"model": EMBEDDER, "input": "hi"},
    ("POST", "/v1/fim/completions"): {"model": MODEL, "prompt": "def f():", "suffix": "\n"},
    ("POST", "/infill"): {"model": MODEL, "input_prefix": "def f():", "input_suffix": "\n"},
    ("GET", "/v1/models"): None,
    ("GET", "/v1/models/{name:path}"): None,
    ("POST", "/v1/scan"): {"text": "print(1)"},
    ("GET", "/v1/audit/receipt/{reference}"): None,
    ("GET", "/v1/responses/{response_id}"): None,
    ("DELETE", "/v1/responses/{response_id}"): None,
    ("GET", "/v1/responses/{response_id}/input_items"): None,
    ("POST", "/tokenize"): {"model": MODEL, "prompt": "hi"},
    ("POST", "/v1/messages/count_tokens"): {"model": MODEL, "messages": TURNS},
}
ADMIN_ROUTES: dict[tuple[str, str], dict[str, Any] | None] = {
    ("GET", "/metrics"): None,
    ("POST", "/admin/render"): {"model": MODEL, "messages": TURNS},
    ("GET", "/admin/status"): None,
    ("GET", "/admin/keys"): None,
    ("POST", "/admin/keys"): {"subject": "bob"},
    ("GET", "/admin/keys/{key_id}"): None,
    ("POST", "/admin/keys/{key_id}/rotate"): {},
    ("POST", "/admin/keys/{key_id}/revoke"): {},
    ("GET", "/admin/policy"): None,
    ("POST", "/admin/policy/reload"): {},
    ("POST", "/admin/policy/why"): {"action": "model:chat:create"},
    ("GET", "/admin/usage"): None,
    ("GET", "/admin/incidents"): None,
    ("POST", "/admin/incidents"): {"kind": "model", "target": "other"},
    ("POST", "/admin/incidents/{incident_id}/lift"): {},
}
LISTS = {("GET", "/v1/models"), ("GET", "/v1/models/{name:path}")}
"""Whoever may use nothing sees nothing here: an empty list, or 404."""


def routes_of(app):
    return {(method, route.path) for route in app.routes for method in route.methods or ()}


def test_every_route_has_a_row():
    nothing: Any = SimpleNamespace(traffic=None, models=None, access=None, guard=None, receipts=None, stored=None)
    nothing.ready, nothing.cors_origins = bool, ()
    edge = build_public(cast("PublicDeps", nothing))
    assert isinstance(edge, Edge)
    inner: Any = edge._app
    assert routes_of(inner) == set(ROUTES) | OPEN
    assert {("POST", route) for route, _ in MODEL_ROUTES} <= set(ROUTES)
    nothing.routers = (identity_router(cast("Any", nothing)),)
    nothing.listener = nothing.metrics = nothing.policy = None
    admin: Any = build_admin(cast("AdminDeps", nothing))
    while not hasattr(admin, "routes"):
        admin = admin._app
    assert routes_of(admin) - OPEN == set(ADMIN_ROUTES)


class Issuer:
    """An identity provider of one key; tokens are made at will, wrong ones too."""

    def __init__(self):
        self.key = ec.generate_private_key(ec.SECP256R1())
        public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(self.key.public_key()))

        class Pages(http.server.BaseHTTPRequestHandler):
            pages: ClassVar[dict[str, Any]] = {}

            def do_GET(self):
                body = json.dumps(self.pages.get(self.path, {})).encode()
                self.send_response(200 if self.path in self.pages else 404)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            @override
            def log_message(self, format, *args):
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        jwks = {"keys": [public | {"kid": "k", "use": "sig", "alg": "ES256"}]}
        Pages.pages = {
            "/.well-known/openid-configuration": {"issuer": self.url, "jwks_uri": self.url + "/jwks"},
            "/jwks": jwks,
        }
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def token(self, **changes):
        now_s = int(time.time())
        claims = {
            "iss": self.url, "aud": AUDIENCE, "sub": "ana", "client_id": "ide", "tenant": "acme",
            "groups": ["developers"], "scope": "strongroom.use", "iat": now_s, "exp": now_s + 600,
            "jti": str(time.monotonic_ns()),
        } | changes  # fmt: skip
        return jwt.encode(claims, self.key, "ES256", headers={"typ": "at+jwt", "kid": "k"})


class Authority:
    """Signs certificates into a folder."""

    def __init__(self, folder, name):
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._builder(self.name, self.key, 0, 1).add_extension(x509.BasicConstraints(True, 0), critical=True)
        self.file = folder / f"{name}.pem"
        self.file.write_bytes(made.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _builder(self, subject, key, from_days, to_days):
        now, day = datetime.datetime.now(tz=datetime.UTC), datetime.timedelta(days=1)
        return (
            x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - day * (1 - from_days)).not_valid_after(now + day * to_days)
        )  # fmt: skip

    def issue(self, file, subject, tenant, group, *, usage=ExtendedKeyUsageOID.CLIENT_AUTH, days=(0.0, 1.0)):
        key = ec.generate_private_key(ec.SECP256R1())
        parts = (
            (NameOID.COMMON_NAME, subject), (NameOID.ORGANIZATION_NAME, tenant),
            (NameOID.ORGANIZATIONAL_UNIT_NAME, group),
        )  # fmt: skip
        name = x509.Name([x509.NameAttribute(oid, value) for oid, value in parts])
        made = (
            self._builder(name, key, *days)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (self.folder / f"{file}.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM) + pem)
        return made.fingerprint(hashes.SHA256()).hex()


class SecureKit(GatewayKit):
    """A gateway whose public listener speaks TLS."""

    @property
    @override
    def base(self):
        return f"https://localhost:{self.settings.public.port}"


class World:
    """The gateway with all three kinds of credential, good ones and bad ones."""

    def __init__(self, folder, monkeypatch):
        self.issuer = Issuer()
        authority, evil = Authority(folder, "ca"), Authority(folder, "evil-ca")
        self.folder = folder
        authority.issue("server", "localhost", "x", "x", usage=ExtendedKeyUsageOID.SERVER_AUTH)
        authority.issue("ana", "ana", "acme", "developers")
        authority.issue("zoe", "zoe", "zeta", "developers")
        authority.issue("visitor", "visitor", "acme", "visitors")
        authority.issue("past", "ana", "acme", "developers", days=(-1.0, -0.5))
        evil.issue("evil", "ana", "acme", "developers")
        revoked = authority.issue("gone", "gone", "acme", "developers")
        authority.issue("locked", "locked", "acme", "developers")
        (folder / "revoked").write_text(revoked + "\n")
        made = make_kit(
            folder / "state",
            oidc={
                "issuer": self.issuer.url, "audience": AUDIENCE,
                "scope_map": {"strongroom.use": ["*"], "strongroom.read": ["weights:model:unseal"]},
            },
            public={
                "tls": {
                    "certificate": str(folder / "server.pem"), "key": str(folder / "server.pem"),
                    "client_ca": str(authority.file), "revoked": str(folder / "revoked"),
                },
                "header_timeout_s": 30.0, "body_timeout_s": 30.0,
            },
        )  # fmt: skip
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
        self.kit = SecureKit(made.state, made.settings, made.signer)
        self.kit.start()
        self.addresses = (f"127.1.{high}.{low}" for high, low in itertools.product(range(250), range(1, 250)))
        new = self.kit.new_key
        self.keys = {
            "good": new(groups={"developers"}, tenant="acme", subject="ana"),
            "other": new(groups={"developers"}, tenant="acme", subject="eva"),
            "expired": new(groups={"developers"}, tenant="acme", expires_at_s=time.time() + 1),
            "narrow": new(groups={"developers", "security"}, tenant="acme", scopes={"weights:model:unseal"}),
            "visitor": new(groups={"visitors"}, tenant="acme"),
            "revoked": new(groups={"developers"}, tenant="acme", subject="left"),
        }
        store = Store.open(self.kit.settings.store_url)
        with store.write() as connection:
            row = next(row for row in list_keys(connection) if row.subject == "left")
            revoke_key(connection, row.id, reason="left", at_s=time.time())
            open_incident(connection, Quarantined.SUBJECT, "acme/locked", reason="test", by="sam", at_s=time.time())
        store.close()
        self.kit.wait_for_key(self.keys["visitor"])
        time.sleep(1)  # until the key that is to have expired has

    def ask(self, route, headers, certificate=None, *, admin=False):
        """Return status and body of one call from an address of its own, so that no failure slows another."""
        (method, path), body = route, (ADMIN_ROUTES if admin else ROUTES)[route]
        path = path.replace("{name:path}", MODEL).replace("{incident_id}", "99")
        path = path.replace("{response_id}", "resp_none").replace("{reference}", "req_none").replace("{key_id}", "none")
        source = (next(self.addresses), 0)
        if admin:
            link = http.client.HTTPConnection("127.0.0.1", self.kit.settings.admin.port, 30, source)
        else:
            context = ssl.create_default_context(cafile=self.folder / "ca.pem")
            context.check_hostname = False  # reached by its address, so that the source address fits
            if certificate is not None:
                context.load_cert_chain(self.folder / f"{certificate}.pem")
            port = self.kit.settings.public.port
            link = http.client.HTTPSConnection("127.0.0.1", port, timeout=30, source_address=source, context=context)
        with contextlib.closing(link):
            link.putrequest(method, path)
            for name, value in headers:
                link.putheader(name, value)
            content = json.dumps(body).encode() if body is not None else b""
            link.putheader("content-type", "application/json")
            link.putheader("content-length", str(len(content)))
            link.endheaders(content)
            answer = link.getresponse()
            return answer.status, answer.read()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = World(tmp_path_factory.mktemp("matrix"), monkeypatch)
        try:
            yield made
        finally:
            made.kit.stop()
            made.issuer.server.shutdown()
            made.issuer.server.server_close()


class Fault(NamedTuple):
    """What is offered, and what comes of it: a status, or None where TLS already refuses."""

    status: int | None
    headers: Any = lambda _world: []
    certificate: str | None = None


def bearer(make):
    return lambda world: [("authorization", f"Bearer {make(world)}")]


def key(name):
    return bearer(lambda world: world.keys[name])


def token(**changes):
    return bearer(lambda world: world.issuer.token(**changes))


def forged(world):
    head, payload, _ = world.issuer.token().split(".")
    return ".".join([head, payload, world.issuer.token(sub="other").rpartition(".")[2]])


def none_token(world):
    claims = jwt.decode(world.issuer.token(), options={"verify_signature": False})
    return jwt.encode(claims, "", "none", headers={"typ": "at+jwt", "kid": "k"})


GOOD = {
    "key": Fault(200, key("good")),
    "key in x-api-key": Fault(200, lambda world: [("x-api-key", world.keys["good"])]),
    "key in api-key": Fault(200, lambda world: [("api-key", world.keys["good"])]),
    "token": Fault(200, token()),
    "certificate": Fault(200, certificate="ana"),
    "key beside a certificate of its tenant": Fault(200, key("good"), "ana"),
}
FAULTS = {
    "absent": Fault(401),
    "key, malformed": Fault(401, bearer(lambda world: world.keys["good"][:-1])),
    "key, wrong secret": Fault(401, bearer(lambda world: world.keys["good"][:-1] + "~")),
    "key, expired": Fault(401, key("expired")),
    "key, revoked": Fault(401, key("revoked")),
    "key, wrong scope": Fault(403, key("narrow")),
    "key, restricted": Fault(403, key("visitor")),
    "key, beside a certificate of another tenant": Fault(401, key("good"), "zoe"),
    "key, header twice": Fault(401, lambda world: key("good")(world) * 2),
    "key, two in two headers": Fault(401, lambda world: [*key("good")(world), ("x-api-key", world.keys["other"])]),
    "key, as Basic": Fault(401, lambda world: [("authorization", f"Basic {world.keys['good']}")]),
    "key, in a cookie": Fault(401, lambda world: [("cookie", f"api_key={world.keys['good']}")]),
    "token, malformed": Fault(401, bearer(lambda _world: "a.b.c")),
    "token, forged": Fault(401, bearer(forged)),
    "token, algorithm none": Fault(401, bearer(none_token)),
    "token, expired": Fault(401, token(exp=1_700_000_000)),
    "token, subject in quarantine": Fault(401, token(sub="locked")),
    "token, wrong scope": Fault(403, token(scope="strongroom.read")),
    "token, unknown scope": Fault(403, token(scope="profile")),
    "token, restricted": Fault(403, token(groups=["visitors"])),
    "token, other audience": Fault(401, token(aud="https://other.test")),
    "token, other issuer": Fault(401, token(iss="https://other.test")),
    "token, no tenant": Fault(401, token(tenant="")),
    "token, beside a certificate of another tenant": Fault(401, token(), "zoe"),
    "token, header twice": Fault(401, lambda world: [("authorization", f"Bearer {world.issuer.token()}")] * 2),
    "token, and a key": Fault(401, lambda world: [*token()(world), ("api-key", world.keys["good"])]),
    "certificate, of a strange authority": Fault(None, certificate="evil"),
    "certificate, expired": Fault(None, certificate="past"),
    "certificate, revoked": Fault(401, certificate="gone"),
    "certificate, subject in quarantine": Fault(401, certificate="locked"),
    "certificate, restricted": Fault(403, certificate="visitor"),
}
TLS_REFUSALS = (ssl.SSLError, ConnectionError, http.client.BadStatusLine)


@pytest.mark.parametrize("offer", GOOD)
def test_a_valid_credential_is_let_in(world, offer):
    fault = GOOD[offer]
    for route in ROUTES:
        status, body = world.ask(route, fault.headers(world), fault.certificate)
        expected = 404 if "{re" in route[1] else 200  # what is asked for by an id is not there
        if offer == "certificate" and route[1].startswith(("/v1/scan", "/v1/audit")):
            expected = 403  # a certificate's scope is that of models
        assert status == expected, (route, status, body)


@pytest.mark.parametrize("offer", FAULTS)
def test_what_is_wrong_is_refused_on_every_route(world, offer):
    fault = FAULTS[offer]
    bodies = set()
    for route in ROUTES:
        if fault.status is None:
            with pytest.raises(TLS_REFUSALS):
                world.ask(route, fault.headers(world), fault.certificate)
            continue
        status, body = world.ask(route, fault.headers(world), fault.certificate)
        if fault.status == 403 and route in LISTS:
            assert MODEL.encode() not in body if route[1] == "/v1/models" else status == 404, (route, body)
            continue
        assert status == fault.status, (route, status, body)
        if status == 401:
            error = json.loads(body)["error"]
            bodies.add((error["message"], error.get("code")) if "/messages" not in route[1] else error["message"])
    assert len(bodies) <= 2, "one text in each dialect"


@pytest.mark.parametrize("offer", [name for name, fault in FAULTS.items() if fault.certificate is None])
def test_what_is_wrong_is_refused_on_every_admin_route(world, offer):
    fault = FAULTS[offer]
    for route in ADMIN_ROUTES:
        status, body = world.ask(route, fault.headers(world), admin=True)
        assert status == fault.status, (route, status, body)


@pytest.mark.parametrize("offer", ["key", "token"])
def test_a_developer_reaches_no_admin_route(world, offer):
    """AZ-02; what was refused is on record."""
    for route in ADMIN_ROUTES:
        status, body = world.ask(route, GOOD[offer].headers(world), admin=True)
        assert status == 403, (route, status, body)
    assert world.kit.entries()[-1]["event"] == "admin:request:refused"


@pytest.mark.parametrize("route", sorted(OPEN))
def test_what_is_open_says_nothing(world, route):
    context = ssl.create_default_context(cafile=world.folder / "ca.pem")
    context.check_hostname = False
    with contextlib.closing(
        http.client.HTTPSConnection("127.0.0.1", world.kit.settings.public.port, timeout=30, context=context)
    ) as link:
        link.request(*route)
        answer = link.getresponse()
        assert (answer.status, answer.read()) == (200, b"" if route[0] == "HEAD" else b"ok\n")
