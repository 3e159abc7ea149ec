"""The public listener's routes: every wire format by path, the model list, and what a health check may see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.api.body import Body, parse_json_object
from server.api.chat import ChatFormat
from server.api.completions import CompletionFormat
from server.api.edge import Edge, not_found
from server.api.embeddings import EmbeddingFormat
from server.api.exchange import Exchange, read_client, read_credentials
from server.api.fim import FIMFormat
from server.api.infill import InfillFormat
from server.api.messages import MessageFormat
from server.api.models import anthropic_model, list_models, openai_model
from server.api.problems import describe
from server.api.responses import ResponseFormat
from server.api.service import parse_count, parse_scan, parse_tokenize, scan_answer, scan_record
from server.api.stored import DELETE, READ
from server.errors import MethodNotAllowedError, ModelNotFoundError, StrongroomError
from server.pipeline import canonical
from server.types import Chat, Obligations

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import ASGIApp, Scope

    from server.api.access import Access
    from server.api.exchange import Keeper, Traffic
    from server.api.stored import StoredResponses
    from server.api.wire import Format
    from server.registry.served import ModelRegistry, ServedModel
    from server.types import ModelRequest, Principal, Prompt, ScanReport

MODEL_ROUTES: tuple[tuple[str, Format], ...] = (
    ("/v1/chat/completions", ChatFormat()),
    ("/v1/completions", CompletionFormat()),
    ("/v1/responses", ResponseFormat()),
    ("/v1/messages", MessageFormat()),
    ("/v1/embeddings", EmbeddingFormat()),
    ("/v1/fim/completions", FIMFormat()),
    ("/infill", InfillFormat()),
)
"""Every route that reaches a model; the tests enumerate controls over this table."""


class Scans(Protocol):
    """The guard, as `/v1/scan` uses it."""

    async def scan(self, text: str, *, language: str | None = None, path: str | None = None) -> ScanReport:
        """Return the verdict on one text."""
        ...


class Receipts(Protocol):
    """Where receipts are found."""

    async def find(self, reference: str, principal: Principal) -> dict[str, Any]:
        """Return the receipt of one's own request."""
        ...


@dataclass(frozen=True, slots=True)
class PublicDeps:
    """What the public routes need."""

    traffic: Traffic
    models: ModelRegistry
    access: Access
    guard: Scans
    receipts: Receipts
    stored: StoredResponses
    ready: Callable[[], bool]
    cors_origins: tuple[str, ...] = ()


def is_anthropic(scope: Scope) -> bool:
    """Whether the caller speaks Anthropic's dialect: by route, or by its version header."""
    if scope["path"].startswith("/v1/messages"):
        return True
    return any(name == b"anthropic-version" for name, _ in scope["headers"])


def problem_response(error: BaseException, scope: Scope) -> Response:
    """Return the answer to an error of a route that is no wire format of its own."""
    problem = describe(error)
    body = orjson.dumps(problem.anthropic(scope["request_id"])) if is_anthropic(scope) else problem.openai_bytes()
    return Response(body, problem.status, problem.headers, "application/json; charset=utf-8")


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return `value` as JSON."""
    return Response(orjson.dumps(value), status, headers, "application/json; charset=utf-8")


def install_error_handlers(app: FastAPI) -> None:
    """Answer unknown paths and methods in the dialect of the path, and errors by the one map."""

    async def unknown(request: Request, err: Exception) -> Response:
        status = err.status_code if isinstance(err, HTTPException) else 500
        if status == 405:
            allowed = (err.headers or {}).get("Allow", "") if isinstance(err, HTTPException) else ""
            refusal = MethodNotAllowedError(f"{request.scope['method'][:16]} is not served here; use {allowed}.")
            response = problem_response(refusal, request.scope)
            response.headers["allow"] = allowed
            return response
        return problem_response(not_found(request.scope["path"]), request.scope)

    async def known(request: Request, err: Exception) -> Response:
        return problem_response(err, request.scope)

    app.add_exception_handler(HTTPException, unknown)
    app.add_exception_handler(StrongroomError, known)
    app.add_exception_handler(Exception, known)


def model_endpoint(fmt: Format, route: str, traffic: Traffic, keeper: Keeper | None) -> Callable[[Request], Any]:
    """Return the endpoint of one wire format."""

    async def endpoint(request: Request) -> Response:
        return Exchange(fmt, route, traffic, keeper)

    endpoint.__name__ = fmt.wire_format.replace(".", "_")
    return endpoint


def build_public(deps: PublicDeps) -> ASGIApp:
    """Return the public application."""
    app = FastAPI(title="Strongroom", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    install_error_handlers(app)
    keepers = {"/v1/responses": deps.stored}
    for route, fmt in MODEL_ROUTES:
        endpoint = model_endpoint(fmt, route, deps.traffic, keepers.get(route))
        app.add_api_route(route, endpoint, methods=["POST"], response_model=None)

    async def visible(request: Request) -> list[tuple[str, ServedModel]]:
        scope = request.scope
        client = read_client(scope)
        principal = await deps.access.identify(read_credentials(scope), client, scope["path"])
        # Not counted, unlike all else: clients ask it to see whether they are let in, and it tells what is in memory.
        models = [m for m in deps.models.models if deps.access.may_list(principal, m.id, client)]
        return [(name, m) for m in models for name in (m.id, *m.settings.aliases)]

    async def models(request: Request) -> Response:
        named = await visible(request)
        return json_response(list_models(named, anthropic=is_anthropic(request.scope)))

    async def model(request: Request, name: str) -> Response:
        named = await visible(request)
        for known_name, known in named:
            if known_name == name:
                form = anthropic_model if is_anthropic(request.scope) else openai_model
                return json_response(form(name, known))
        raise ModelNotFoundError(
            f"The model {name[:80]!r} does not exist or you may not use it; GET /v1/models lists what there is.",
            param="model",
        )

    async def body_of(request: Request) -> dict[str, Any]:
        limits = deps.traffic.limits
        body = Body(request.scope, request.receive, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
        return parse_json_object(await body.read())

    async def scan(request: Request) -> Response:
        scope = request.scope
        client = read_client(scope)
        principal = await deps.access.admit(read_credentials(scope), client, "/v1/scan", "guard:text:scan")
        wanted = parse_scan(await body_of(request))
        async with deps.access.counted(principal, client, "/v1/scan", num_requests=len(wanted.items)) as headers:
            # One after the other: a batch must not keep all the scanning workers from answers that wait for them.
            reports = []
            for one in wanted.items:
                await deps.access.check_revoked(principal, client, "/v1/scan")
                reports.append(await deps.guard.scan(one.text, language=one.language, path=one.path))
        told = {"request_id": scope["request_id"], "address": client.address, **scan_record(wanted, reports)}
        await deps.access.act("guard:text:scanned", principal, **told)
        return json_response(scan_answer(wanted, reports), headers=headers)

    async def receipt(request: Request, reference: str) -> Response:
        scope = request.scope
        client = read_client(scope)
        principal = await deps.access.admit(read_credentials(scope), client, "/v1/audit/receipt", "audit:receipt:read")
        async with deps.access.counted(principal, client, "/v1/audit/receipt") as headers:
            return json_response(await deps.receipts.find(reference, principal), headers=headers)

    async def own(request: Request, action: str, act: Callable[[Principal], Awaitable[Any]]) -> Response:
        scope = request.scope
        client, route = read_client(scope), "/v1/responses/{id}"
        principal = await deps.access.admit(read_credentials(scope), client, route, action)
        async with deps.access.counted(principal, client, route) as headers:
            return json_response(await act(principal), headers=headers)

    async def stored_response(request: Request, response_id: str) -> Response:
        return await own(request, READ, lambda principal: deps.stored.read(principal, response_id))

    async def stored_items(request: Request, response_id: str) -> Response:
        query = dict(request.query_params)
        return await own(request, READ, lambda principal: deps.stored.list_items(principal, response_id, query))

    async def delete_response(request: Request, response_id: str) -> Response:
        return await own(request, DELETE, lambda principal: deps.stored.delete(principal, response_id))

    async def count(
        request: Request, parse: Callable[[dict[str, Any]], ModelRequest], route: str
    ) -> tuple[ServedModel, Prompt, dict[str, str]]:
        scope = request.scope
        client = read_client(scope)
        principal = await deps.access.identify(read_credentials(scope), client, route)
        wanted = parse(await body_of(request))
        model = deps.models.find(wanted.model)
        wanted = canonical(wanted, model)
        await deps.access.permit(principal, "model:token:count", wanted, client, route)
        # A conversation is counted as it would be served, the security template included; a raw text as it stands.
        demands = Obligations(stand_in="raw")
        if isinstance(wanted.payload, Chat):
            demands = deps.access.obligations(principal, "model:chat:create", wanted, client)
        async with deps.access.counted(principal, client, route, model.id) as headers:
            return model, await model.render(wanted, demands, principal), headers

    async def tokenize(request: Request) -> Response:
        model, prompt, headers = await count(request, parse_tokenize, "/tokenize")
        answer: dict[str, Any] = {"count": prompt.num_tokens, "max_model_len": model.engine.max_model_len}
        if prompt.template.id == "none":  # ids of a templated prompt would spell the template out
            answer["tokens"] = prompt.token_ids
        return json_response(answer, headers=headers)

    async def count_tokens(request: Request) -> Response:
        _, prompt, headers = await count(request, parse_count, "/v1/messages/count_tokens")
        return json_response({"input_tokens": prompt.num_tokens}, headers=headers)

    async def live(request: Request) -> Response:
        return Response(b"ok\n", media_type="text/plain; charset=utf-8")

    async def ready(request: Request) -> Response:
        if deps.ready() and not deps.traffic.draining:
            return Response(b"ok\n", media_type="text/plain; charset=utf-8")
        return Response(b"not ready\n", 503, {"retry-after": "5"}, "text/plain; charset=utf-8")

    async def head(request: Request) -> Response:
        return Response(b"", 200)

    app.add_api_route("/v1/models", models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET"], response_model=None)
    app.add_api_route("/v1/scan", scan, methods=["POST"], response_model=None)
    app.add_api_route("/v1/audit/receipt/{reference}", receipt, methods=["GET"], response_model=None)
    app.add_api_route("/v1/responses/{response_id}", stored_response, methods=["GET"], response_model=None)
    app.add_api_route("/v1/responses/{response_id}", delete_response, methods=["DELETE"], response_model=None)
    app.add_api_route("/v1/responses/{response_id}/input_items", stored_items, methods=["GET"], response_model=None)
    app.add_api_route("/tokenize", tokenize, methods=["POST"], response_model=None)
    app.add_api_route("/v1/messages/count_tokens", count_tokens, methods=["POST"], response_model=None)
    app.add_api_route("/livez", live, methods=["GET"], response_model=None)
    app.add_api_route("/readyz", ready, methods=["GET"], response_model=None)
    app.add_api_route("/", head, methods=["HEAD"], response_model=None)
    direct = {route: partial(Exchange, fmt, route, deps.traffic, keepers.get(route)) for route, fmt in MODEL_ROUTES}
    return Edge(app, cors_origins=deps.cors_origins, direct=direct)
