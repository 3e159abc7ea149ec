"""What clients rely on, on every route that has it: a table of routes and of what each must do; real sockets."""

import json
from typing import Any

import httpx
import pytest

from benchmarks.gateway.kit import EMBEDDER, MODEL
from server.api.public import MODEL_ROUTES

TURN = {"messages": [{"role": "user", "content": "hi"}]}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": MODEL, **TURN},
    "/v1/completions": {"model": MODEL, "prompt": "def f():"},
    "/v1/responses": {"model": MODEL, "input": "hi"},
    "/v1/messages": {"model": MODEL, "max_tokens": 32, **TURN},
    "/v1/embeddings": {"model": EMBEDDER, "input": "hi"},
    "/v1/fim/completions": {"model": MODEL, "prompt": "def f():", "suffix": "\n"},
    "/infill": {"model": MODEL, "input_prefix": "def f():", "input_suffix": "\n"},
}
STOPS = {
    "/v1/chat/completions": "stop", "/v1/completions": "stop", "/v1/messages": "stop_sequences",
    "/v1/fim/completions": "stop", "/infill": "stop",
}  # fmt: skip
LENGTHS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens"), "/v1/completions": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",), "/v1/messages": ("max_tokens",), "/v1/fim/completions": ("max_tokens",),
    "/infill": ("n_predict",),
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ODD_TOOLS = [{"type": "web_search"}, {"type": "namespace", "name": "n", "tools": []}, {"type": "custom", "name": "c"}]


def tools_of(route, schema=SCHEMA):
    """One function tool in the route's dialect, and what forces it: any tool, this tool."""
    if route == "/v1/chat/completions":
        tool = {"type": "function", "function": {"name": "add", "parameters": schema}}
        return tool, "required", {"type": "function", "function": {"name": "add"}}
    if route == "/v1/responses":
        return (
            {"type": "function", "name": "add", "parameters": schema},
            "required",
            {"type": "function", "name": "add"},
        )
    return {"name": "add", "input_schema": schema}, {"type": "any"}, {"type": "tool", "name": "add"}


WITH_TOOLS = ["/v1/chat/completions", "/v1/responses", "/v1/messages"]


def format_of(route, schema):
    """A request for an answer that holds to a schema."""
    if route == "/v1/chat/completions":
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "r", "schema": schema}}}
    return {"text": {"format": {"type": "json_schema", "name": "r", "schema": schema}}}


@pytest.fixture
def post(gateway, key):
    def send(route, **fields):
        body = {**BODIES[route], **fields}
        return httpx.post(gateway.base + route, json=body, headers={"authorization": f"Bearer {key}"}, timeout=20)

    return send


def code_of(route, response):
    error = response.json()["error"]
    assert error["message"]
    assert ("type" in response.json()) == route.startswith("/v1/messages")
    return error["code"]


def test_the_table_names_every_route():
    assert set(BODIES) == {route for route, _ in MODEL_ROUTES}
    assert set(LENGTHS) == set(BODIES) - {"/v1/embeddings"}


@pytest.mark.parametrize("route", STOPS)
def test_as_many_stop_strings_as_editors_send_reach_the_engine(gateway, post, route):
    stops = [f"<stop {n}>" for n in range(32)]
    assert post(route, **{STOPS[route]: stops}).status_code == 200
    assert gateway.stats()["last_body"]["stop"] == stops
    assert post(route, **{STOPS[route]: [f"{n}" for n in range(65)]}).status_code == 400


def test_infill_names_the_word_that_ended_it(gateway, post):
    gateway.control(text="return a; b", num_tokens=3)
    answer = post("/infill", stop=[";"]).json()
    assert (answer["content"], answer["stop_type"], answer["stopping_word"]) == ("return a", "word", ";")
    gateway.control(num_tokens=3)
    assert post("/infill", stop=["never"]).json()["stop_type"] == "eos"


@pytest.mark.parametrize(("route", "name"), [(route, name) for route, names in LENGTHS.items() for name in names])
@pytest.mark.parametrize("asked", [32_000, 64_000, 2**31])
def test_a_length_beyond_the_context_is_cut_and_not_refused(gateway, post, route, name, asked):
    response = post(route, **{name: asked})
    assert response.status_code == 200, response.text
    body = gateway.stats()["last_body"]
    assert 0 < (body.get("max_tokens") or body.get("max_completion_tokens")) < 4096


@pytest.mark.parametrize("route", LENGTHS)
def test_without_a_length_the_answer_is_bounded(gateway, post, route):
    assert post(route).status_code == 200
    body = gateway.stats()["last_body"]
    assert 0 < (body.get("max_tokens") or body.get("max_completion_tokens")) < 4096


@pytest.mark.parametrize("route", WITH_TOOLS)
def test_tools_of_unknown_types_are_dropped_with_a_log_line(gateway, post, route):
    tool, _, _ = tools_of(route)
    log = gateway.state / "logs" / "gateway.log"
    before = log.read_text().count("dropped a tool")
    assert post(route, tools=[*ODD_TOOLS, tool]).status_code == 200
    (sent,) = gateway.stats()["last_body"]["tools"]
    assert sent["function"]["name"] == "add"
    assert log.read_text().count("dropped a tool") == before + len(ODD_TOOLS)
    assert post(route, tools=ODD_TOOLS).status_code == 200
    assert "tools" not in gateway.stats()["last_body"]


@pytest.mark.parametrize("route", WITH_TOOLS)
@pytest.mark.parametrize("forced", [1, 2])
def test_a_forced_tool_holds_to_its_schema(gateway, post, route, forced):
    tool, *choices = tools_of(route)
    assert post(route, tools=[tool], tool_choice=choices[forced - 1]).status_code == 200
    body = gateway.stats()["last_body"]
    assert body["tools"][0]["function"]["strict"] is True
    assert body["tools"][0]["function"]["parameters"] == SCHEMA
    assert body["tool_choice"] == ("required" if forced == 1 else {"type": "function", "function": {"name": "add"}})


@pytest.mark.parametrize("route", WITH_TOOLS[:2])
def test_a_schema_for_the_answer_reaches_the_engine(gateway, post, route):
    assert post(route, **format_of(route, SCHEMA)).status_code == 200
    assert gateway.stats()["last_body"]["response_format"]["json_schema"]["schema"] == SCHEMA


def deep(levels):
    return {"type": "object", "properties": {"a": deep(levels - 1)}} if levels else {"type": "string"}


@pytest.mark.parametrize(
    "schema",
    [
        deep(40),
        {"type": "object", "properties": {f"p{n}": {"type": "string"} for n in range(3000)}},
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "string", "pattern": "a{60000}"},
        {"type": "object", "$ref": "https://example.com/schema.json"},
        {"type": "planet"},
        {"const": "ab" * 1000},
        {"type": "object", "properties": {f"p{n}": {} for n in range(200)}},
        "not a schema",
    ],
)
@pytest.mark.parametrize("route", WITH_TOOLS)
def test_a_schema_past_the_bounds_is_refused_wherever_it_stands(post, route, schema):
    tool, _, _ = tools_of(route, schema)
    refused = [post(route, tools=[tool])]
    if route != "/v1/messages":
        refused.append(post(route, **format_of(route, schema)))
    for response in refused:
        assert response.status_code == 400
        code_of(route, response)


@pytest.mark.parametrize("route", BODIES)
def test_a_limit_is_told_in_the_dialect_with_whole_seconds(limited, route):
    kit, keys = limited
    headers = {"authorization": f"Bearer {keys[route]}"}
    first = httpx.post(kit.base + route, json=BODIES[route], headers=headers, timeout=20)
    assert first.status_code == 200, first.text
    second = httpx.post(kit.base + route, json=BODIES[route], headers=headers, timeout=20)
    assert second.status_code == 429
    assert second.headers["retry-after"].isdecimal()
    assert 1 <= int(second.headers["retry-after"]) <= 120  # this minute slides into the next
    assert code_of(route, second) == "rate_limit_exceeded"
    assert second.headers["x-request-id"].startswith("req_")
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    if route.startswith("/v1/messages"):
        assert second.json()["error"]["type"] == "rate_limit_error"
        assert second.json()["request_id"] == second.headers["x-request-id"]


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    from benchmarks.gateway.kit import make_kit

    state = tmp_path_factory.mktemp("limited")
    limits = state / "limits.yaml"
    limits.write_text(json.dumps({"limits": [{"per": "subject", "requests_per_minute": 1}], "max_wait_s": 0}))
    kit = make_kit(state / "gw", limits={"file": str(limits)}, public={"cors_origins": ["https://chat.example.com"]})
    try:
        kit.start()
        keys = {route: kit.new_key(groups={"developers"}, subject=f"s{n}") for n, route in enumerate(BODIES)}
        for key in keys.values():
            kit.wait_for_key(key)
        yield kit, keys
    finally:
        kit.stop()


@pytest.mark.parametrize("route", [*BODIES, "/v1/models"])
def test_browsers_of_configured_origins_may_call_and_no_others(limited, route):
    kit, _ = limited
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    ours = {"origin": "https://chat.example.com"}
    preflight = httpx.options(kit.base + route, headers=ours | ask)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == ours["origin"]
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    refused = httpx.post(kit.base + route, json={}, headers=ours)  # a browser must be able to read the refusal
    assert refused.status_code in (401, 405)
    assert refused.headers["access-control-allow-origin"] == ours["origin"]
    assert "x-request-id" in refused.headers["access-control-expose-headers"]
    for origin in ("https://evil.example.com", "null", "https://chat.example.com.evil.example.com"):
        for response in (
            httpx.options(kit.base + route, headers={"origin": origin} | ask),
            httpx.post(kit.base + route, json={}, headers={"origin": origin}),
        ):
            assert "access-control-allow-origin" not in response.headers
