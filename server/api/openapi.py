"""The public routes as an OpenAPI 3.1 description; bounds come from the parsers' own constants.

The server does not serve it: `docs/openapi.json` is written by `strongroom openapi`, and the tests hold the three
together (the description and the routes that there are, the file and the description, the server and the file).
"""

from __future__ import annotations

from typing import Any

from server.api import fields, stored
from server.api.embeddings import MAX_INPUTS
from server.api.infill import MAX_EXTRA_FILES
from server.api.service import FORMATS, MAX_NAME_CHARS, MAX_SCAN_CHARS, MAX_SCAN_ITEMS

Schema = dict[str, Any]

_ANY: Schema = {}
_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": ["boolean", "null"]}
_EVENT: Schema = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
_OBJECT: Schema = {"type": "object"}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_MODEL: Schema = {"type": "string", "minLength": 1, "maxLength": fields.MAX_MODEL_CHARS}
_NAME: Schema = {"type": "string", "pattern": fields.NAME.pattern}
_STOP: Schema = {
    "anyOf": [
        {"type": "null"},
        {"type": "string", "maxLength": fields.MAX_STOP_CHARS},
        {
            "type": "array",
            "maxItems": fields.MAX_STOP_STRINGS,
            "items": {"type": "string", "maxLength": fields.MAX_STOP_CHARS},
        },
    ]
}

_ERRORS = {
    400: "The request is wrong: `error.code` and `error.param` say what and where.",
    401: "No valid key.",
    403: "No policy permits it, or the guard blocked the text.",
    404: "No such model or object, or not the caller's.",
    408: "The body did not arrive in time.",
    410: "A newer completion of the caller made this one useless.",
    413: "The body is larger than the server accepts.",
    415: "The body is not JSON, or is compressed.",
    429: "A limit is spent; `Retry-After` says for how many seconds.",
    502: "The engine failed on this request.",
    503: "The server cannot answer now; `Retry-After` says when to try again.",
}
_READ_ERRORS = (400, 401, 403, 404, 429, 503)


def _number(low: float, high: float) -> Schema:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def _integer(low: int, high: int) -> Schema:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def _record(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """Return an object that may hold more than is named: unknown fields are ignored."""
    schema: Schema = {"type": "object", "properties": properties}
    return schema | ({"required": list(required)} if required else {})


def _list(items: Schema, **bounds: int) -> Schema:
    return {"type": "array", "items": items, **bounds}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_SAMPLING: dict[str, Schema] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _integer(-1, 1_000_000),
    "min_p": _number(0, 1),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 10),
    "seed": _integer(-(2**63), 2**63 - 1),
    "n": _integer(1, fields.MAX_CHOICES),
    "stop": _STOP,
    "stream": _FLAG,
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": _FLAG}},
}
_MAX_TOKENS = _integer(1, 2**31)
_FUNCTION = _record(("name",), name=_NAME, description={"type": ["string", "null"]}, parameters=_OBJECT, strict=_FLAG)
_TOOLS: Schema = {
    "type": ["array", "null"],
    "maxItems": fields.MAX_TOOLS,
    "items": _record(("type", "function"), type={"const": "function"}, function=_FUNCTION),
}
_PARTS = _list(_record(("type", "text"), type={"const": "text"}, text=_TEXT), maxItems=1024)
_CONTENT: Schema = {"anyOf": [_TEXT, _PARTS]}
_MESSAGES = _list(
    _record(
        ("role", "content"),
        role={"enum": ["system", "developer", "user", "assistant", "tool"]},
        content=_CONTENT,
        name=_NAME,
    ),
    minItems=1,
    maxItems=fields.MAX_MESSAGES,
)

_OR_NULL: Schema = {"type": ["string", "null"]}
_SCANNED: dict[str, Schema] = {
    "text": {"type": "string", "maxLength": MAX_SCAN_CHARS},
    "language": {"type": ["string", "null"], "maxLength": MAX_NAME_CHARS},
    "path": {"type": ["string", "null"], "maxLength": MAX_NAME_CHARS},
}
_SCAN_FORMAT: Schema = {"enum": [None, *FORMATS]}
_STATE: Schema = {"enum": ["clean", "findings", "unscanned"]}
_VERDICT: dict[str, Schema] = {"state": _STATE, "reason": _OR_NULL, "findings": _list(_OBJECT)}

_SCHEMAS: dict[str, Schema] = {
    "OpenAIError": _record(
        ("error",),
        error=_record(
            ("message", "type", "param", "code"),
            message=_TEXT,
            type=_TEXT,
            param={"type": ["string", "null"]},
            code=_TEXT,
            findings=_list(_OBJECT),
        ),
    ),
    "AnthropicError": _record(
        ("type", "error", "request_id"),
        type={"const": "error"},
        error=_record(("type", "message"), type=_TEXT, message=_TEXT, code=_TEXT),
        request_id=_TEXT,
    ),
    "ChatRequest": _record(
        ("model", "messages"),
        model=_MODEL,
        messages=_MESSAGES,
        tools=_TOOLS,
        max_tokens=_MAX_TOKENS,
        max_completion_tokens=_MAX_TOKENS,
        response_format={
            "type": ["object", "null"],
            "required": ["type"],
            "properties": {"type": {"enum": ["text", "json_object"]}},
        },
        logprobs=_FLAG,
        top_logprobs=_integer(0, fields.MAX_TOP_LOGPROBS),
        **_SAMPLING,
    ),
    "Chat": _record(
        ("id", "object", "created", "model", "choices", "usage"),
        id=_TEXT,
        object={"const": "chat.completion"},
        created=_COUNT,
        model=_TEXT,
        choices=_list(
            _record(("index", "message", "finish_reason"), index=_COUNT, message=_OBJECT, finish_reason=_TEXT)
        ),
        usage=_ref("Usage"),
    ),
    "Usage": _record(
        ("prompt_tokens", "completion_tokens", "total_tokens"),
        prompt_tokens=_COUNT,
        completion_tokens=_COUNT,
        total_tokens=_COUNT,
    ),
    "CompletionRequest": _record(
        ("model", "prompt"),
        model=_MODEL,
        prompt=_TEXT,
        suffix={"type": ["string", "null"]},
        max_tokens=_MAX_TOKENS,
        logprobs=_integer(0, fields.MAX_TOP_LOGPROBS),
        **_SAMPLING,
    ),
    "Completion": _record(
        ("id", "object", "created", "model", "choices", "usage"),
        id=_TEXT,
        object={"const": "text_completion"},
        created=_COUNT,
        model=_TEXT,
        choices=_list(_record(("index", "text", "finish_reason"), index=_COUNT, text=_TEXT, finish_reason=_TEXT)),
        usage=_ref("Usage"),
    ),
    "ResponseRequest": _record(
        ("model", "input"),
        model=_MODEL,
        input={
            "anyOf": [
                {"type": "string", "minLength": 1},
                _list(
                    _record(
                        ("role", "content"), role={"enum": ["user", "assistant", "system", "developer"]}, content=_TEXT
                    ),
                    minItems=1,
                    maxItems=fields.MAX_MESSAGES,
                ),
            ]
        },
        instructions={"type": ["string", "null"]},
        max_output_tokens=_MAX_TOKENS,
        temperature=_number(0, 2),
        top_p=_number(0, 1),
        stream=_FLAG,
        store=_FLAG,
        previous_response_id={"anyOf": [{"type": "null"}, _NAME]},
    ),
    "Response": _record(
        ("id", "object", "created_at", "status", "output", "store"),
        id=_TEXT,
        object={"const": "response"},
        created_at=_COUNT,
        status={"enum": ["completed", "incomplete"]},
        output=_list(_OBJECT),
        store={"type": "boolean"},
        previous_response_id={"type": ["string", "null"]},
    ),
    "ItemList": _record(
        ("object", "data", "first_id", "last_id", "has_more"),
        object={"const": "list"},
        data=_list(_OBJECT),
        has_more={"type": "boolean"},
    ),
    "DeletedResponse": _record(("id", "object", "deleted"), id=_TEXT, deleted={"const": True}),
    "MessageRequest": _record(
        ("model", "messages"),
        model=_MODEL,
        messages=_list(
            _record(("role", "content"), role={"enum": ["user", "assistant", "system"]}, content=_CONTENT),
            minItems=1,
            maxItems=fields.MAX_MESSAGES,
        ),
        system={"anyOf": [{"type": "null"}, _CONTENT]},
        max_tokens=_MAX_TOKENS,
        temperature=_number(0, 2),
        top_p=_number(0, 1),
        top_k=_integer(-1, 1_000_000),
        stop_sequences=_STOP,
        stream=_FLAG,
        tools={
            "type": ["array", "null"],
            "maxItems": fields.MAX_TOOLS,
            "items": _record(("name", "input_schema"), name=_NAME, input_schema=_OBJECT),
        },
        tool_choice={
            "type": ["object", "null"],
            "properties": {"type": {"enum": ["auto", "any", "none", "tool"]}, "name": _ANY},
        },
    ),
    "Message": _record(
        ("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"),
        id=_TEXT,
        type={"const": "message"},
        role={"const": "assistant"},
        content=_list(_OBJECT),
        stop_sequence={"type": ["string", "null"]},
        usage=_record(("input_tokens", "output_tokens"), input_tokens=_COUNT, output_tokens=_COUNT),
    ),
    "TokenCount": _record(("input_tokens",), input_tokens=_COUNT),
    "EmbeddingRequest": _record(
        ("model", "input"),
        model=_MODEL,
        input={
            "anyOf": [
                {"type": "string", "minLength": 1},
                _list({"type": "string", "minLength": 1}, minItems=1, maxItems=MAX_INPUTS),
            ]
        },
        encoding_format={"enum": [None, "float", "base64"]},
        dimensions=_integer(1, 16384),
    ),
    "Embeddings": _record(
        ("object", "data", "model", "usage"),
        object={"const": "list"},
        data=_list(_record(("index", "embedding"), embedding={"anyOf": [_TEXT, _list({"type": "number"})]})),
        usage=_record(("prompt_tokens", "total_tokens"), prompt_tokens=_COUNT, total_tokens=_COUNT),
    ),
    "FIMRequest": _record(
        ("model", "prompt"),
        model=_MODEL,
        prompt=_TEXT,
        suffix={"type": ["string", "null"]},
        max_tokens=_MAX_TOKENS,
        **_SAMPLING,
    ),
    "InfillRequest": _record(
        (),
        model=_MODEL,
        input_prefix={"type": ["string", "null"]},
        input_suffix={"type": ["string", "null"]},
        prompt={"type": ["string", "null"]},
        input_extra={
            "type": ["array", "null"],
            "maxItems": MAX_EXTRA_FILES,
            "items": _record(("text",), text=_TEXT, filename=_TEXT),
        },
        n_predict={"anyOf": [{"const": -1}, _MAX_TOKENS]},
        temperature=_number(0, 2),
        top_p=_number(0, 1),
        stop=_STOP,
        stream=_FLAG,
    ),
    "Infill": _record(
        ("index", "content", "stop", "model", "stop_type", "tokens_predicted", "tokens_evaluated", "truncated"),
        content=_TEXT,
        stop={"const": True},
        stop_type={"enum": ["eos", "limit", "word"]},
        stopping_word=_TEXT,
        tokens_predicted=_COUNT,
        tokens_evaluated=_COUNT,
    ),
    "TokenizeRequest": _record(
        ("model",), model=_MODEL, prompt=_TEXT, messages={"anyOf": [{"type": "null"}, _MESSAGES]}, tools=_TOOLS
    ),
    "Tokens": _record(("count", "max_model_len"), count=_COUNT, max_model_len=_COUNT, tokens=_list(_COUNT)),
    "ScanRequest": {
        **_record(
            (),
            **_SCANNED,
            items=_list(_record(("text",), **_SCANNED), minItems=1, maxItems=MAX_SCAN_ITEMS),
            format=_SCAN_FORMAT,
        ),
        "oneOf": [{"required": ["text"]}, {"required": ["items"]}],
    },
    "Scan": {
        "anyOf": [
            _record(("object", "state", "findings"), object={"const": "scan"}, **_VERDICT),
            _record(
                ("object", "state", "items"),
                object={"const": "scan.batch"},
                state=_STATE,
                items=_list(_record(("index", "state", "findings"), index=_COUNT, path=_OR_NULL, **_VERDICT)),
            ),
            _record(("version", "runs"), version={"const": "2.1.0"}, runs=_list(_OBJECT)),
        ]
    },
    "Model": {
        "anyOf": [
            _record(("id", "object", "created", "owned_by", "max_model_len"), object={"const": "model"}),
            _record(("type", "id", "display_name", "created_at"), type={"const": "model"}),
        ]
    },
    "ModelList": _record(("data",), data=_list(_ref("Model"))),
    "Receipt": _OBJECT,
}

# method, path, operation id, one line, request and answer schema; the answer None is plain text.
_MODEL_ROUTES = (
    ("/v1/chat/completions", "chat", "OpenAI chat completion", "ChatRequest", "Chat"),
    ("/v1/completions", "completion", "OpenAI text completion, with suffix", "CompletionRequest", "Completion"),
    ("/v1/responses", "response", "OpenAI response", "ResponseRequest", "Response"),
    ("/v1/messages", "message", "Anthropic message", "MessageRequest", "Message"),
    ("/v1/embeddings", "embedding", "OpenAI embeddings", "EmbeddingRequest", "Embeddings"),
    ("/v1/fim/completions", "fim", "Fill in the middle, Mistral's form", "FIMRequest", "Chat"),
    ("/infill", "infill", "Fill in the middle, llama.cpp's form", "InfillRequest", "Infill"),
)
_SERVICE_ROUTES = (
    ("/v1/messages/count_tokens", "countTokens", "Tokens of a message request", "MessageRequest", "TokenCount"),
    ("/tokenize", "tokenize", "Tokens of a text or a conversation", "TokenizeRequest", "Tokens"),
    ("/v1/scan", "scan", "The guard's verdict on a text or a batch; SARIF on demand", "ScanRequest", "Scan"),
)
_READ_ROUTES = (
    ("get", "/v1/models", "listModels", "The models one may see", "ModelList"),
    ("get", "/v1/models/{name}", "getModel", "One model, by id or alias", "Model"),
    ("get", "/v1/responses/{response_id}", "getResponse", "One's own stored response", "Response"),
    ("delete", "/v1/responses/{response_id}", "deleteResponse", "Delete one's own response", "DeletedResponse"),
    ("get", "/v1/responses/{response_id}/input_items", "listInputItems", "What it answered", "ItemList"),
    ("get", "/v1/audit/receipt/{reference}", "getReceipt", "Proof that one's own request is on the log", "Receipt"),
)
_PAGING = (
    ("limit", {"type": "integer", "minimum": 1, "maximum": stored.MAX_LISTED}),
    ("order", {"enum": ["asc", "desc"]}),
    ("after", {"type": "string"}),
)


def describe() -> dict[str, Any]:
    """Return the description, JSON-ready, in an order that stays the same."""
    paths: dict[str, Any] = {}
    for path, name, summary, wanted, answer in (*_MODEL_ROUTES, *_SERVICE_ROUTES):
        streams = path in {route for route, *_ in _MODEL_ROUTES} - {"/v1/embeddings"}
        anthropic = path.startswith("/v1/messages")
        paths.setdefault(path, {})["post"] = {
            "operationId": name,
            "summary": summary,
            "requestBody": {"required": True, "content": _json(_ref(wanted))},
            "responses": {
                "200": _answer(summary, _ref(answer), streams=streams),
                **_refusals(tuple(_ERRORS), anthropic=anthropic),
            },
        }
    for method, path, name, summary, answer in _READ_ROUTES:
        parameters = [
            {"name": part[1:-1], "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for part in path.split("/")
            if part.startswith("{")
        ]
        if path.endswith("/input_items"):
            parameters += [{"name": key, "in": "query", "required": False, "schema": kind} for key, kind in _PAGING]
        paths.setdefault(path, {})[method] = {
            "operationId": name,
            "summary": summary,
            "parameters": parameters,
            "responses": {"200": _answer(summary, _ref(answer)), **_refusals(_READ_ERRORS)},
        }
    plain = {"text/plain": {"schema": _TEXT}}
    for path, states in (("/livez", ("200",)), ("/readyz", ("200", "503"))):
        paths[path] = {
            "get": {
                "operationId": path[1:],
                "summary": "Whether the server lives" if path == "/livez" else "Whether its models answer",
                "security": [],
                "responses": {state: {"description": "ok or not", "content": plain} for state in states},
            }
        }
    paths["/"] = {
        "head": {
            "operationId": "root",
            "summary": "There is a server",
            "security": [],
            "responses": {"200": {"description": "Nothing more"}},
        }
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Strongroom",
            "version": "1",
            "description": "The public listener. Unknown fields are ignored; what each client sends is in clients.md.",
        },
        "servers": [{"url": "http://127.0.0.1:8000"}],
        "security": [{"bearer": []}, {"xApiKey": []}, {"apiKey": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "xApiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "api-key"},
            },
            "responses": _error_answers(),
            "schemas": _SCHEMAS,
        },
    }


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _answer(summary: str, schema: Schema, *, streams: bool = False) -> dict[str, Any]:
    content = _json(schema) | ({"text/event-stream": {"schema": _EVENT}} if streams else {})
    return {"description": summary, "content": content}


def _refusals(statuses: tuple[int, ...], *, anthropic: bool = False) -> dict[str, Any]:
    dialect = "Anthropic" if anthropic else "OpenAI"
    return {str(status): {"$ref": f"#/components/responses/{dialect}{status}"} for status in statuses}


def _error_answers() -> dict[str, Any]:
    """Return every refusal in both dialects; routes that both share answer by the header `anthropic-version`."""
    either = {"anyOf": [_ref("OpenAIError"), _ref("AnthropicError")]}
    dialects = (("OpenAI", either), ("Anthropic", _ref("AnthropicError")))
    return {
        f"{dialect}{status}": {"description": text, "content": _json(schema)}
        for dialect, schema in dialects
        for status, text in _ERRORS.items()
    }
