"""The admin listener's routes for keys, policies, usage and incidents."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import Body, parse_json_object
from server.api.exchange import read_client, read_credentials
from server.api.public import json_response
from server.auth.key_admin import KeyAdmin, KeySpec, describe_key
from server.errors import ConfigError, NotFoundError, RequestError
from server.policy.cases import evaluate, parse_question
from server.policy.permissions import Permission, covers, parse_scope
from server.store.incidents import Incident, Quarantined, lift_incident, list_incidents, open_incident
from server.store.keys import get_key
from server.store.usage_report import parse_day_s, report_usage

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine

    from sqlalchemy import Connection

    from server.api.access import Access
    from server.auth.pepper import Pepper
    from server.policy.engine import PolicyEngine
    from server.settings import ListenerSettings
    from server.store.database import Store
    from server.store.keys import KeyRow
    from server.store.watch import StoreWatch
    from server.types import Principal

DAY_S = 86400.0
MAX_RECORD_S = 30.0
MAX_TARGET_CHARS = 256
MAX_NAMES = 256


@dataclass(frozen=True, slots=True)
class IdentityDeps:
    """What these routes need.

    Attributes:
        access: Who may do what.
        policy: The policies in force.
        store: Keys, usage and incidents.
        pepper: What keys are stored under.
        watch: Told after a change, so that this replica follows at once and not within a second.
        record: Puts an act on the audit log, durable on return.
        listener: Limits of bodies.
        model_id: A model's own id by any of its names; None for one that is not served.
        templates: The ids of the templates in force.
    """

    access: Access
    policy: PolicyEngine
    store: Store
    pepper: Pepper
    watch: StoreWatch
    record: Callable[..., Coroutine[Any, Any, Any]]
    listener: ListenerSettings
    model_id: Callable[[str], str | None]
    templates: Callable[[], Collection[str]]


def identity_router(deps: IdentityDeps) -> APIRouter:
    """Return the routes; every one asks for a permission of its own."""
    routes = _Routes(deps)
    router = APIRouter(prefix="/admin")
    for path, handler, method in (
        ("/keys", routes.list_keys, "GET"),
        ("/keys", routes.create_key, "POST"),
        ("/keys/{key_id}", routes.show_key, "GET"),
        ("/keys/{key_id}/rotate", routes.rotate_key, "POST"),
        ("/keys/{key_id}/revoke", routes.revoke_key, "POST"),
        ("/policy", routes.show_policy, "GET"),
        ("/policy/reload", routes.reload_policy, "POST"),
        ("/policy/why", routes.why, "POST"),
        ("/usage", routes.usage, "GET"),
        ("/incidents", routes.incidents, "GET"),
        ("/incidents", routes.open_incident, "POST"),
        ("/incidents/{incident_id}/lift", routes.lift_incident, "POST"),
    ):
        router.add_api_route(path, handler, methods=[method], response_model=None)
    return router


class _Routes:
    def __init__(self, deps: IdentityDeps) -> None:
        self._deps = deps

    async def list_keys(self, request: Request) -> Response:
        caller, sees_all = await self._admit(request, Permission.KEY_READ)
        tenant = request.query_params.get("tenant")
        if not sees_all:
            if tenant not in (None, caller.tenant):
                await self._refuse(request, caller, Permission.KEY_READ, "You see the keys of your own tenant only.")
            tenant = caller.tenant
        rows = await asyncio.to_thread(self._keys(caller).list, tenant=tenant)
        return json_response({"keys": [describe_key(row, self._deps.store.clock()) for row in rows]})

    async def show_key(self, request: Request) -> Response:
        caller, sees_all = await self._admit(request, Permission.KEY_READ)
        row = await self._find_key(caller, request.path_params["key_id"], sees_all=sees_all)
        return json_response(describe_key(row, self._deps.store.clock()))

    async def create_key(self, request: Request) -> Response:
        caller, sees_all = await self._admit(request, Permission.KEY_CREATE)
        fields = await self._read(request, {"subject", "tenant", "groups", "scopes", "expires_in_s", "note"})
        spec = self._parse_spec(fields, caller)
        if spec.tenant != caller.tenant and not sees_all:
            await self._refuse(request, caller, Permission.KEY_CREATE, "You make keys for your own tenant only.")
        if not sees_all and (reason := _more_rights(caller, spec.groups, spec.scopes)):
            await self._refuse(request, caller, Permission.KEY_CREATE, reason)
        row, text = await self._act(self._keys(caller).create, spec)
        return json_response(describe_key(row, self._deps.store.clock()) | {"key": text.reveal()}, 201)

    async def rotate_key(self, request: Request) -> Response:
        caller, sees_all = await self._admit(request, Permission.KEY_CREATE)
        fields = await self._read(request, {"overlap_s"})
        overlap_s = fields.get("overlap_s", DAY_S)
        if isinstance(overlap_s, bool) or not isinstance(overlap_s, (int, float)) or not 0 <= overlap_s <= 90 * DAY_S:
            raise RequestError("'overlap_s' must be a number of seconds, at most 90 days.", param="overlap_s")
        old = await self._find_key(caller, request.path_params["key_id"], sees_all=sees_all)
        # The answer holds the successor's text: whoever reads it can be whom it stands for.
        if not sees_all and (reason := _more_rights(caller, old.groups, old.scopes)):
            await self._refuse(request, caller, Permission.KEY_CREATE, reason)
        row, text = await self._act(self._keys(caller).rotate, old.id, overlap_s=float(overlap_s))
        return json_response(describe_key(row, self._deps.store.clock()) | {"key": text.reveal()}, 201)

    async def revoke_key(self, request: Request) -> Response:
        caller, sees_all = await self._admit(request, Permission.KEY_REVOKE)
        fields = await self._read(request, {"reason"})
        old = await self._find_key(caller, request.path_params["key_id"], sees_all=sees_all)
        row = await self._act(
            self._keys(caller).revoke, old.id, reason=_text(fields, "reason", "revoked by an operator")
        )
        return json_response(describe_key(row, self._deps.store.clock()))

    async def show_policy(self, request: Request) -> Response:
        await self._admit(request, Permission.POLICY_READ)
        policies = self._deps.policy.current
        told = [
            {
                "policy": rule.id,
                "effect": rule.effect,
                "file": rule.file,
                "description": rule.description,
                "actions": sorted(rule.actions),
            }
            for rule in policies.rules.values()
        ]
        return json_response({"digest": policies.digest, "policies": told})

    async def reload_policy(self, request: Request) -> Response:
        caller, _sees_all = await self._admit(request, Permission.POLICY_RELOAD)
        fresh = await asyncio.to_thread(self._deps.policy.read_next)
        before = self._deps.policy.current.digest
        await self._deps.record("admin:policy:changed", **_by(caller), before=before, after=fresh.digest)
        self._deps.policy.adopt(fresh)
        return json_response({"before": before, "after": fresh.digest})

    async def why(self, request: Request) -> Response:
        await self._admit(request, Permission.POLICY_READ)
        fields = await self._read(request, None)
        try:
            question = parse_question(fields, "question")
        except ConfigError as error:
            raise RequestError(str(error)) from error
        decision = await asyncio.to_thread(evaluate, self._deps.policy.current, question)
        return json_response(
            {
                "allowed": decision.allowed,
                "reason": decision.reason,
                "policies": list(decision.policies),
                "digest": decision.policy_digest,
            }
        )

    async def usage(self, request: Request) -> Response:
        caller, sees_all = await self._admit(request, Permission.USAGE)
        asked = request.query_params
        tenant = asked.get("tenant") if sees_all else caller.tenant
        now_s = self._deps.store.clock()
        from_s = parse_day_s(asked["from"], "from") if "from" in asked else now_s - 30 * DAY_S
        to_s = parse_day_s(asked["to"], "to") if "to" in asked else now_s
        rows = await asyncio.to_thread(
            report_usage, self._deps.store, from_s=from_s, to_s=to_s, by=asked.get("by", "tenant"), tenant=tenant
        )
        return json_response({"usage": rows})

    async def incidents(self, request: Request) -> Response:
        caller, sees_all = await self._admit(request, Permission.INCIDENT_READ)
        with_lifted = request.query_params.get("all") == "true"
        found = await asyncio.to_thread(self._list_incidents, None if sees_all else caller, with_lifted=with_lifted)
        return json_response({"incidents": [_describe(one) for one in found]})

    async def open_incident(self, request: Request) -> Response:
        caller, sees_all = await self._admit(request, Permission.INCIDENT_OPEN)
        fields = await self._read(request, {"kind", "target", "reason"})
        kinds = ", ".join(Quarantined)
        if fields.get("kind") not in list(Quarantined):
            raise RequestError(f"'kind' must be one of {kinds}.", param="kind")
        target = _text(fields, "target", "")
        if not 1 <= len(target) <= MAX_TARGET_CHARS:
            raise RequestError("'target' must name what is quarantined; a subject as tenant/subject.", param="target")
        kind, reason = Quarantined(fields["kind"]), _text(fields, "reason", "no reason given")
        if not sees_all and not await asyncio.to_thread(self._may_quarantine, caller, kind, target):
            reason = "You quarantine keys and subjects of your own tenant only, or all of it."
            await self._refuse(request, caller, Permission.INCIDENT_OPEN, reason)
        target = await asyncio.to_thread(self._find_target, kind, target)
        record = self._recorder(caller)

        def act() -> Incident:
            with self._deps.store.write() as connection:
                opened = open_incident(
                    connection,
                    kind,
                    target,
                    reason=reason,
                    by=caller.subject,
                    at_s=self._deps.store.clock(),
                    across_tenants=sees_all,
                )
                record("admin:incident:opened", **_told(opened))
            return opened

        return json_response(_describe(await self._act(act)), 201)

    async def lift_incident(self, request: Request) -> Response:
        caller, sees_all = await self._admit(request, Permission.INCIDENT_LIFT)
        await self._read(request, set())
        number = request.path_params["incident_id"]
        if not (number.isascii() and number.isdigit() and len(number) < 16):
            raise NotFoundError("There is no incident of this number.")
        if not sees_all:
            own = await asyncio.to_thread(self._list_incidents, caller, with_lifted=True)
            found = next((one for one in own if one.id == int(number)), None)
            if found is None:
                raise NotFoundError("There is no incident of this number.")
            if found.across_tenants:
                reason = "Who opened this incident manages all tenants; ask somebody who does to lift it."
                await self._refuse(request, caller, Permission.INCIDENT_LIFT, reason)
        record = self._recorder(caller)

        def act() -> Incident:
            with self._deps.store.write() as connection:
                lifted = lift_incident(connection, int(number), by=caller.subject, at_s=self._deps.store.clock())
                record("admin:incident:closed", **_told(lifted))
            return lifted

        return json_response(_describe(await self._act(act)))

    async def _admit(self, request: Request, permission: Permission) -> tuple[Principal, bool]:
        """Return who asks and whether they see other tenants."""
        client = read_client(request.scope)
        caller = await self._deps.access.admit(
            read_credentials(request.scope), client, request.scope["path"], permission
        )
        return caller, self._deps.access.sees_all_tenants(caller, client)

    async def _refuse(self, request: Request, caller: Principal, permission: Permission, reason: str) -> NoReturn:
        client = read_client(request.scope)
        await self._deps.access.refuse(caller, permission, client, request.scope["path"], reason)

    async def _read(self, request: Request, known: set[str] | None) -> dict[str, Any]:
        listener = self._deps.listener
        body = Body(
            request.scope, request.receive, max_bytes=listener.max_body_bytes, timeout_s=listener.body_timeout_s
        )
        content = await body.read()
        fields = parse_json_object(content) if content.strip() else {}
        unknown = set(fields) - known if known is not None else set()
        if unknown:
            raise RequestError(f"Unknown field; known are {', '.join(sorted(known or ()))}.", param=min(unknown)[:64])
        return fields

    async def _act(self, act: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Do an act off the event loop, then have this replica follow."""
        result = await asyncio.to_thread(act, *arguments, **named)
        await asyncio.to_thread(self._deps.watch.poll)
        return result

    def _keys(self, caller: Principal) -> KeyAdmin:
        by = f"{caller.tenant}/{caller.subject}"
        return KeyAdmin(self._deps.store, self._deps.pepper, record=self._recorder(), by=by)

    async def _find_key(self, caller: Principal, key_id: str, *, sees_all: bool) -> KeyRow:
        row = await asyncio.to_thread(self._keys(caller).get, key_id)
        if row.tenant != caller.tenant and not sees_all:
            raise NotFoundError("There is no key of this id; see 'strongroom keys list'.")
        return row

    def _list_incidents(self, caller: Principal | None, *, with_lifted: bool) -> list[Incident]:
        """Return the incidents that concern the caller's tenant alone; all of them for None."""
        with self._deps.store.read() as connection:
            found = list_incidents(connection, with_lifted=with_lifted)
            return [one for one in found if caller is None or _is_own(connection, caller, one.kind, one.target)]

    def _find_target(self, kind: Quarantined, target: str) -> str:
        """Return what the switch must hold: a name that nothing goes by would take nothing out of service.

        Raises:
            NotFoundError: There is no such model, template or key.
            RequestError: A subject without its tenant.
        """
        if kind is Quarantined.MODEL:
            model = self._deps.model_id(target)
            if model is None:
                raise NotFoundError("No model of this name is served; GET /v1/models lists them.")
            return model
        if kind is Quarantined.TEMPLATE and target not in self._deps.templates():
            raise NotFoundError("There is no template of this id; see 'strongroom template list'.")
        if kind is Quarantined.KEY and ":" not in target:  # tokens' and certificates' ids have one, and no row
            with self._deps.store.read() as connection:
                get_key(connection, target)
        if kind is Quarantined.SUBJECT and not all(target.partition("/")[::2]):
            raise RequestError("A subject is named tenant/subject.", param="target")
        return target

    def _may_quarantine(self, caller: Principal, kind: Quarantined, target: str) -> bool:
        with self._deps.store.read() as connection:
            return _is_own(connection, caller, kind, target)

    def _parse_spec(self, fields: dict[str, Any], caller: Principal) -> KeySpec:
        expires_in_s = fields.get("expires_in_s")
        if expires_in_s is not None and (isinstance(expires_in_s, bool) or not isinstance(expires_in_s, (int, float))):
            raise RequestError("'expires_in_s' must be a number of seconds.", param="expires_in_s")
        try:
            scopes = frozenset(parse_scope(scope) for scope in _names(fields, "scopes"))
        except ValueError as error:
            raise RequestError(f"{error}.", param="scopes") from error
        return KeySpec(
            subject=_text(fields, "subject", ""),
            tenant=_text(fields, "tenant", caller.tenant),
            groups=frozenset(_names(fields, "groups")),
            scopes=scopes,
            expires_at_s=None if expires_in_s is None else self._deps.store.clock() + float(expires_in_s),
            note=_text(fields, "note", ""),
        )

    def _recorder(self, caller: Principal | None = None) -> Callable[..., None]:
        """Return a way to put an act on record from the thread in which the store changes: both, or neither."""
        loop, who = asyncio.get_running_loop(), {} if caller is None else _by(caller)

        def record(event: str, **fields: Any) -> None:
            asyncio.run_coroutine_threadsafe(self._deps.record(event, **who, **fields), loop).result(MAX_RECORD_S)

        return record


def _more_rights(caller: Principal, groups: frozenset[str], scopes: frozenset[str]) -> str | None:
    """Return why a key would be able to do more than the caller's own; None where it would not.

    Whoever manages all tenants may hand out any.
    """
    if extra := groups - caller.groups:
        return f"You give only groups that you are in yourself, not {min(extra)}."
    for permission in Permission:
        if covers(scopes, permission) and not covers(caller.scopes, permission):
            return f"You give only scopes that you have yourself, not {permission}."
    return None


def _is_own(connection: Connection, caller: Principal, kind: Quarantined, target: str) -> bool:
    """Whether what is quarantined is the caller's tenant or belongs to it; models and templates serve everybody."""
    match kind:
        case Quarantined.TENANT:
            return target == caller.tenant
        case Quarantined.SUBJECT:
            return target.partition("/")[0] == caller.tenant
        case Quarantined.KEY:
            try:
                return get_key(connection, target).tenant == caller.tenant
            except NotFoundError:
                return False
        case _:
            return False


def _by(caller: Principal) -> dict[str, str]:
    return {"by": f"{caller.tenant}/{caller.subject}"}


def _text(fields: dict[str, Any], name: str, default: str) -> str:
    value = fields.get(name, default)
    if not isinstance(value, str):
        raise RequestError(f"'{name}' must be a text.", param=name)
    return value


def _names(fields: dict[str, Any], name: str) -> list[str]:
    value = fields.get(name, [])
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value) or len(value) > MAX_NAMES:
        raise RequestError(f"'{name}' must be a list of at most {MAX_NAMES} texts.", param=name)
    return value


def _told(incident: Incident) -> dict[str, Any]:
    return {"incident": incident.id, "kind": str(incident.kind), "target": incident.target, "reason": incident.reason}


def _describe(incident: Incident) -> dict[str, Any]:
    return {
        "id": incident.id,
        "kind": incident.kind,
        "target": incident.target,
        "reason": incident.reason,
        "opened_at_s": incident.opened_at_s,
        "opened_by": incident.opened_by,
        "lifted_at_s": incident.lifted_at_s,
        "lifted_by": incident.lifted_by,
        "across_tenants": incident.across_tenants,
    }
