"""The admin listener's routes: metrics, the rendering of a request as the engine would get it, and the rooms' own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import Body, parse_json_object
from server.api.edge import Edge
from server.api.exchange import read_client, read_credentials
from server.api.public import MODEL_ROUTES, install_error_handlers, json_response
from server.errors import RequestError
from server.pipeline import canonical
from server.policy.permissions import Permission

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastapi import APIRouter
    from starlette.types import ASGIApp

    from server.api.access import Access
    from server.ports import Guard, Models
    from server.settings import ListenerSettings


@dataclass(frozen=True, slots=True)
class AdminDeps:
    """What the admin routes need."""

    access: Access
    models: Models
    guard: Guard
    listener: ListenerSettings
    metrics: Callable[[], Awaitable[bytes]]
    tenant_metrics: Callable[[str], bytes]
    ready: Callable[[], dict[str, Any]]
    routers: tuple[APIRouter, ...] = ()


def build_admin(deps: AdminDeps) -> ASGIApp:
    """Return the admin application."""
    app = FastAPI(title="Strongroom admin", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    install_error_handlers(app)
    formats = dict(MODEL_ROUTES)

    async def metrics(request: Request) -> Response:
        client = read_client(request.scope)
        caller = await deps.access.admit(read_credentials(request.scope), client, "/metrics", Permission.METRICS)
        if deps.access.sees_all_tenants(caller, client):
            text = await deps.metrics()
        else:
            text = deps.tenant_metrics(caller.tenant)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def render(request: Request) -> Response:
        client = read_client(request.scope)
        principal = await deps.access.admit(
            read_credentials(request.scope), client, "/admin/render", "admin:prompt:render"
        )
        body = Body(
            request.scope,
            request.receive,
            max_bytes=deps.listener.max_body_bytes,
            timeout_s=deps.listener.body_timeout_s,
        )
        asked = parse_json_object(await body.read())
        path, inner = asked.get("path"), asked.get("body")
        if not isinstance(path, str) or path not in formats:
            raise RequestError(f"'path' must be one of {', '.join(formats)}.", param="path")
        if not isinstance(inner, dict):
            raise RequestError("'body' must be the JSON object that would be sent to that path.", param="body")
        fmt = formats[path]
        wanted = fmt.parse(inner)
        model = deps.models.find(wanted.model)
        wanted = canonical(wanted, model)
        decision = await deps.access.permit(principal, fmt.action, wanted, client, "/admin/render")
        wanted, scan = await deps.guard.admit(wanted, decision.obligations)
        prompt = await model.render(wanted, decision.obligations, principal)
        max_tokens = model.clamp(wanted, prompt, decision.obligations)
        await deps.access.act(
            "admin:render:shown",
            principal,
            route=path,
            model=model.id,
            template=prompt.template.id,
            template_digest=prompt.template.digest,
        )
        return json_response(
            {
                "text": prompt.text,
                "token_ids": prompt.token_ids,
                "inputs": prompt.inputs,
                "template": {
                    "id": prompt.template.id,
                    "version": prompt.template.version,
                    "digest": prompt.template.digest,
                },
                "stand_in": prompt.stand_in,
                "scan": scan.state,
                "model": model.id,
                "max_tokens": max_tokens,
            }
        )

    async def status(request: Request) -> Response:
        await deps.access.admit(
            read_credentials(request.scope), read_client(request.scope), "/admin/status", "admin:model:read"
        )
        return json_response(deps.ready())

    app.add_api_route("/metrics", metrics, methods=["GET"], response_model=None)
    app.add_api_route("/admin/render", render, methods=["POST"], response_model=None)
    app.add_api_route("/admin/status", status, methods=["GET"], response_model=None)
    for router in deps.routers:
        app.include_router(router)
    return Edge(app)
