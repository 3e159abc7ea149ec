"""The admin routes for keys, policies, usage and incidents: permissions, tenants, effect and record."""

import shutil
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

import server.commands.usage as usage_command
from server.api.access import Access
from server.api.admin_identity import IdentityDeps, identity_router
from server.api.public import install_error_handlers
from server.auth.api_key import KeyRing
from server.auth.authenticator import Authenticator
from server.auth.key_admin import KeyAdmin, KeySpec
from server.auth.pepper import Pepper
from server.auth.throttle import FailureThrottle
from server.cli import main
from server.errors import AuditUnavailableError
from server.follow import follow
from server.policy.budget import LimitedUse, UsageBook
from server.policy.engine import ModelFacts, PolicyEngine
from server.policy.limit_file import parse_limits
from server.policy.rate import MemoryLedger
from server.settings import ListenerSettings
from server.store.database import Store
from server.store.incidents import Quarantine
from server.store.watch import StoreWatch
from server.types import Client, Credentials, Secret

PEPPER = Pepper({1: bytes(range(32))})
HERE = Client("127.0.0.1", "test")


class World:
    """An admin listener without its sockets, over a real store and real policies."""

    def __init__(self, folder):
        self.log = []
        self.is_log_down = False
        self.store_url = f"sqlite:///{folder / 'store.db'}"
        self.store = Store.open(self.store_url)
        self.policies = folder / "policy"
        shutil.copytree(Path("configs/policy"), self.policies)
        quarantine = Quarantine()
        self.ring = KeyRing(PEPPER)
        self.watch = StoreWatch(self.store, quarantine=quarantine, on_keys=self.ring.load, used=self.ring.take_used)
        self.auth = Authenticator(
            self.ring, throttle=FailureThrottle(), keyless=FailureThrottle(), quarantine=quarantine
        )
        self.policy = PolicyEngine.load(self.policies, models={"m": ModelFacts()}.get, quarantine=quarantine)
        book = parse_limits({})
        limits = LimitedUse(book, ledger=MemoryLedger(book), usage=UsageBook())
        deps = IdentityDeps(
            Access(self.auth, self.policy, self.record, limits), self.policy, self.store, PEPPER, self.watch,
            self.record, ListenerSettings(), {"m": "m", "default": "m"}.get, {"secure-coding"}.copy,
        )  # fmt: skip
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        install_error_handlers(app)
        app.include_router(identity_router(deps))
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://admin")
        admin = KeyAdmin(self.store, PEPPER, record=lambda *_a, **_k: None, by="test")
        self.keys = {}
        self.ids = {}
        for name, tenant, groups, scopes in (
            ("security", "acme", {"security"}, {"admin:*"}),
            ("auditor", "acme", {"auditors"}, {"admin:*"}),
            ("operator", "acme", {"operators"}, {"admin:*"}),
            ("lead", "acme", {"leads"}, {"*"}),
            ("developer", "acme", {"developers"}, {"*"}),
            ("narrow", "acme", {"security"}, {"model:*"}),
            ("zeta-lead", "zeta", {"leads"}, {"*"}),
            ("zeta-guard", "zeta", {"security"}, {"admin:incident:*"}),
        ):
            row, text = admin.create(KeySpec(name, tenant, frozenset(groups), frozenset(scopes)))
            self.keys[name], self.ids[name] = text.reveal(), row.id
        self.watch.poll()

    async def record(self, event, **fields):
        if self.is_log_down:
            raise AuditUnavailableError("down")
        self.log.append((event, fields))

    async def ask(self, who, method, path, body=None, **changes):
        headers = {"authorization": f"Bearer {self.keys[who]}"} if who else {}
        return await self.client.request(method, path, headers=headers, json=body, **changes)


@pytest.fixture
async def world(tmp_path):
    made = World(tmp_path)
    yield made
    await made.client.aclose()
    made.store.close()


NEW = {"subject": "bob", "groups": ["developers"], "scopes": ["model:*"]}
ROUTES = [
    ("GET", "/admin/keys", None, {"security", "auditor", "operator"}),
    ("POST", "/admin/keys", NEW, {"security"}),
    ("GET", "/admin/keys/none", None, {"security", "auditor", "operator"}),
    ("POST", "/admin/keys/none/rotate", {}, {"security"}),
    ("POST", "/admin/keys/none/revoke", {}, {"security"}),
    ("GET", "/admin/policy", None, {"security", "auditor", "operator"}),
    ("POST", "/admin/policy/reload", {}, {"security"}),
    ("POST", "/admin/policy/why", {"action": "model:chat:create"}, {"security", "auditor", "operator"}),
    ("GET", "/admin/usage", None, {"security", "auditor", "operator", "lead", "zeta-lead"}),
    ("GET", "/admin/incidents", None, {"security", "auditor", "operator", "zeta-guard"}),
    ("POST", "/admin/incidents", {"kind": "model", "target": "other"}, {"security"}),
    ("POST", "/admin/incidents/99/lift", {}, {"security", "zeta-guard"}),
]


@pytest.mark.parametrize(("method", "path", "body", "allowed"), ROUTES)
async def test_every_route_asks_for_a_permission_of_its_own(world, method, path, body, allowed):
    for who in world.keys:
        answer = await world.ask(who, method, path, body)
        if who in allowed:
            assert answer.status_code in (200, 201, 404), (who, answer.text)
        else:
            assert answer.status_code == 403, (who, answer.text)
            event, fields = world.log[-1]
            assert (event, fields["subject"]) == ("admin:request:refused", who)
    assert (await world.ask(None, method, path, body)).status_code == 401


async def test_a_key_is_made_shown_once_used_rotated_and_revoked(world):
    made = await world.ask("security", "POST", "/admin/keys", NEW | {"expires_in_s": 3600, "note": "ide"})
    assert made.status_code == 201
    key = made.json()
    principal = await world.auth.authenticate(Credentials((Secret(key["key"]),)), HERE)
    assert (principal.subject, principal.tenant) == ("bob", "acme")
    shown = await world.ask("security", "GET", f"/admin/keys/{key['id']}")
    assert key["key"] not in shown.text
    assert shown.json()["note"] == "ide"
    new = (await world.ask("security", "POST", f"/admin/keys/{key['id']}/rotate", {"overlap_s": 60})).json()
    assert new["replaces"] == key["id"]
    assert (
        await world.ask("security", "POST", f"/admin/keys/{key['id']}/revoke", {"reason": "left"})
    ).status_code == 200
    assert world.auth.is_revoked(principal)
    acts = [event for event, _fields in world.log]
    assert acts == ["admin:api-key:created", "admin:api-key:rotated", "admin:api-key:revoked"]
    assert all(fields["by"] == "acme/security" for _event, fields in world.log)
    assert key["key"] not in str(world.log)


async def test_nothing_changes_when_the_log_is_down(world):
    world.is_log_down = True
    before = len(world.ring)
    for path, body in (("/admin/keys", NEW), (f"/admin/keys/{world.ids['developer']}/revoke", {}),
                       ("/admin/incidents", {"kind": "tenant", "target": "acme"})):  # fmt: skip
        assert (await world.ask("security", "POST", path, body)).status_code == 503
    (world.policies / "90-guardrails.cedar").write_text('@id("f")\nforbid (principal, action, resource);')
    assert (await world.ask("security", "POST", "/admin/policy/reload", {})).status_code == 503
    world.is_log_down = False
    world.watch.poll()
    assert len(world.ring) == before
    assert (await world.ask("auditor", "GET", "/admin/incidents")).json() == {"incidents": []}
    assert (await world.ask("developer", "GET", "/admin/keys")).status_code == 403


async def test_another_tenants_key_is_as_one_that_is_not_there(world):
    (world.policies / "50-own.cedar").write_text(
        '@id("leads-keys")\npermit (principal in Group::"leads", action in [Action::"admin:key:read", '
        'Action::"admin:key:create", Action::"admin:key:revoke"], resource);'
    )
    world.policy.reload()
    own, other = world.ids["zeta-lead"], world.ids["developer"]
    assert (await world.ask("zeta-lead", "GET", f"/admin/keys/{own}")).status_code == 200
    missing = await world.ask("zeta-lead", "GET", "/admin/keys/nonexistent0")
    for method, path in (("GET", ""), ("POST", "/revoke"), ("POST", "/rotate")):
        answer = await world.ask("zeta-lead", method, f"/admin/keys/{other}{path}", {} if method == "POST" else None)
        assert answer.status_code == 404
        assert answer.json()["error"]["message"] == missing.json()["error"]["message"]
    assert not world.ring.is_revoked(other)
    listed = (await world.ask("zeta-lead", "GET", "/admin/keys")).json()["keys"]
    assert {key["tenant"] for key in listed} == {"zeta"}
    assert (await world.ask("zeta-lead", "GET", "/admin/keys?tenant=acme")).status_code == 403
    assert (await world.ask("zeta-lead", "POST", "/admin/keys", NEW | {"tenant": "acme"})).status_code == 403


async def test_who_manages_one_tenant_hands_out_no_more_rights_than_it_has(world):
    (world.policies / "50-own.cedar").write_text(
        '@id("leads-keys")\npermit (principal in Group::"leads", action == Action::"admin:key:create", resource);'
    )
    world.policy.reload()
    for change in ({"groups": ["security"]}, {"groups": ["leads", "operators"]}):
        made = await world.ask("zeta-lead", "POST", "/admin/keys", NEW | {"tenant": "zeta"} | change)
        assert made.status_code == 403, change
    own = NEW | {"tenant": "zeta", "groups": ["leads"], "scopes": ["admin:key:create"]}
    made = await world.ask("zeta-lead", "POST", "/admin/keys", own)
    assert made.status_code == 201
    world.keys["provisioner"] = made.json()["key"]
    wider = await world.ask("provisioner", "POST", "/admin/keys", own | {"scopes": ["model:*"]})
    assert wider.status_code == 403
    # A successor's text is shown to whoever rotates: that of a stronger key is refused too.
    stronger = await world.ask("lead", "POST", f"/admin/keys/{world.ids['security']}/rotate", {})
    assert stronger.status_code == 403
    assert (await world.ask("security", "POST", "/admin/keys", NEW)).status_code == 201


async def test_the_incident_switch_works_at_once_and_is_lifted(world):
    victim = Credentials((Secret(world.keys["developer"]),))
    principal = await world.auth.authenticate(victim, HERE)
    opened = await world.ask(
        "security", "POST", "/admin/incidents", {"kind": "subject", "target": "acme/developer", "reason": "leak"}
    )
    assert opened.status_code == 201
    assert world.auth.is_revoked(principal)
    assert (await world.ask("developer", "GET", "/admin/usage")).status_code == 401
    again = await world.ask("security", "POST", "/admin/incidents", {"kind": "subject", "target": "acme/developer"})
    assert again.status_code == 409
    assert len((await world.ask("operator", "GET", "/admin/incidents")).json()["incidents"]) == 1
    number = opened.json()["id"]
    assert (await world.ask("security", "POST", f"/admin/incidents/{number}/lift", {})).status_code == 200
    assert not world.auth.is_revoked(principal)
    assert (await world.ask("operator", "GET", "/admin/incidents")).json() == {"incidents": []}
    assert len((await world.ask("operator", "GET", "/admin/incidents?all=true")).json()["incidents"]) == 1
    events = [event for event, _fields in world.log if event.startswith("admin:incident")]
    assert events == ["admin:incident:opened", "admin:incident:closed"]


async def test_the_incident_switch_reaches_no_other_tenant(world):
    """Without `admin:tenant:cross` nobody quarantines, sees or lifts what is another tenant's, nor what serves all."""
    ours = [("tenant", "zeta"), ("subject", "zeta/zeta-lead"), ("key", world.ids["zeta-lead"])]
    theirs = [("tenant", "acme"), ("subject", "acme/developer"), ("key", world.ids["developer"]), ("key", "none"),
              ("model", "m"), ("template", "secure-coding")]  # fmt: skip
    for kind, target in theirs:
        asked = {"kind": kind, "target": target}
        assert (await world.ask("zeta-guard", "POST", "/admin/incidents", asked)).status_code == 403
        event, fields = world.log[-1]
        assert (event, fields["action"]) == ("admin:request:refused", "admin:incident:open")
    opened = []
    for kind, target in [one for one in theirs[1:] if one[1] != "none"] + ours[1:]:
        answer = await world.ask("security", "POST", "/admin/incidents", {"kind": kind, "target": target})
        opened.append((kind, target, answer.json()["id"]))
    seen = (await world.ask("zeta-guard", "GET", "/admin/incidents?all=true")).json()["incidents"]
    assert [(one["kind"], one["target"]) for one in seen] == ours[1:]
    for kind, target, number in opened:
        lifted = await world.ask("zeta-guard", "POST", f"/admin/incidents/{number}/lift", {})
        assert lifted.status_code == (403 if (kind, target) in ours else 404)  # seen, but opened across tenants
        assert (await world.ask("security", "POST", f"/admin/incidents/{number}/lift", {})).status_code == 200
    for kind, target in ours[::-1]:  # its own key, its subject, and last its tenant, which shuts it out
        asked = {"kind": kind, "target": target}
        assert (await world.ask("zeta-guard", "POST", "/admin/incidents", asked)).status_code == 201
    assert (await world.ask("zeta-guard", "GET", "/admin/incidents")).status_code == 401


async def test_the_switch_takes_a_model_out_by_any_of_its_names_and_nothing_that_is_not_there(world):
    opened = await world.ask("security", "POST", "/admin/incidents", {"kind": "model", "target": "default"})
    assert opened.json()["target"] == "m"  # requests are held to the id, so an alias in the switch would do nothing
    for kind, target in (("template", "secure-coding"), ("key", world.ids["developer"]), ("key", "mtls:ab")):
        answer = await world.ask("security", "POST", "/admin/incidents", {"kind": kind, "target": target})
        assert answer.status_code == 201, (kind, answer.text)
    missing = [("model", "modle", 404), ("template", "secure", 404), ("key", "nobody", 404), ("subject", "dev", 400)]
    for kind, target, status in missing:
        answer = await world.ask("security", "POST", "/admin/incidents", {"kind": kind, "target": target})
        assert answer.status_code == status, (kind, answer.text)
    assert len((await world.ask("operator", "GET", "/admin/incidents")).json()["incidents"]) == 4


async def test_usage_shows_leads_their_own_tenant_only(world):
    book = UsageBook()
    for who in ("developer", "zeta-lead"):
        principal = await world.auth.authenticate(Credentials((Secret(world.keys[who]),)), HERE)
        book.add(principal, "m", 10, 20, 5)
    book.flush(world.store)
    rows = (await world.ask("lead", "GET", "/admin/usage?by=subject&tenant=zeta")).json()["usage"]
    assert [(row["tenant"], row["subject"], row["completion_tokens"]) for row in rows] == [("acme", "developer", 20)]
    rows = (await world.ask("auditor", "GET", "/admin/usage?by=tenant")).json()["usage"]
    assert {row["tenant"] for row in rows} == {"acme", "zeta"}
    assert (await world.ask("auditor", "GET", "/admin/usage?by=planet")).status_code == 400
    assert (await world.ask("auditor", "GET", "/admin/usage?from=yesterday")).status_code == 400
    rows = (await world.ask("auditor", "GET", "/admin/usage?from=2020-01-01&to=2020-02-01")).json()["usage"]
    assert rows == []


@pytest.mark.parametrize("by", ["tenant", "team", "subject", "key", "model", "day"])
async def test_the_usage_command_prints_charts_and_csv(world, capsys, by):
    book = UsageBook()
    principal = await world.auth.authenticate(Credentials((Secret(world.keys["developer"]),)), HERE)
    book.add(principal, "m", 10, 20, 2_500_000)
    book.flush(world.store)
    assert main(["usage", "--store", world.store_url, "--by", by]) == 0
    line = capsys.readouterr().out
    assert "30 tokens" in line
    assert "2.50" in line
    assert "█" * usage_command.BAR_CHARS in line
    assert main(["usage", "--store", world.store_url, "--by", by, "--csv"]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.startswith("tenant")
    assert row.endswith("1,10,20,2500000")
    assert main(["usage", "--store", world.store_url, "--tenant", "none"]) == 0
    assert "Nothing" in capsys.readouterr().out


def test_cells_are_no_formulas():
    assert [usage_command._defused(cell) for cell in ("=1+1", "@x", "ana", 3)] == ["'=1+1", "'@x", "ana", 3]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/admin/keys", {}), ("/admin/keys", NEW | {"role": "admin"}), ("/admin/keys", NEW | {"scopes": ["all"]}),
        ("/admin/keys", NEW | {"groups": "developers"}), ("/admin/keys", NEW | {"subject": 7}),
        ("/admin/keys", NEW | {"expires_in_s": -1}), ("/admin/keys", NEW | {"expires_in_s": "soon"}),
        ("/admin/incidents", {"kind": "planet", "target": "x"}), ("/admin/incidents", {"kind": "model", "target": ""}),
        ("/admin/incidents", {"kind": ["model"], "target": "x"}), ("/admin/policy/why", {"action": "nonsense"}),
        ("/admin/policy/why", {"action": "model:chat:create", "colour": "red"}),
    ],
)  # fmt: skip
async def test_bad_bodies_are_a_clear_400(world, path, body):
    answer = await world.ask("security", "POST", path, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


async def test_reload_by_request_and_by_files(world):
    import asyncio

    before = world.policy.current.digest
    text = (world.policies / "90-guardrails.cedar").read_text()
    (world.policies / "90-guardrails.cedar").write_text(text + "\n// a note\n")
    answer = (await world.ask("security", "POST", "/admin/policy/reload", {})).json()
    assert answer == {"before": before, "after": world.policy.current.digest}
    task = asyncio.create_task(follow(world.policy, "admin:policy:changed", world.record, interval_s=0.01))

    async def wait_for(event_count):
        for _ in range(500):
            if len([1 for event, _fields in world.log if event == "admin:policy:changed"]) >= event_count:
                return
            await asyncio.sleep(0.01)
        pytest.fail("the change was not put on record in time")

    await asyncio.sleep(0.02)
    (world.policies / "90-guardrails.cedar").write_text("forbid (")
    await wait_for(2)
    assert world.log[-1][1]["refused"]
    assert world.policy.current.digest == answer["after"]
    (world.policies / "90-guardrails.cedar").write_text(text)
    await wait_for(3)
    await asyncio.sleep(0)
    assert world.policy.current.digest == before
    task.cancel()
