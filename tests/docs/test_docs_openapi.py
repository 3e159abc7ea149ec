"""`docs/openapi.json` is what `strongroom openapi` writes, and names every public route."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from server.api.edge import Edge
from server.api.openapi import describe
from server.api.public import PublicDeps, build_public

FILE = Path("docs/openapi.json")


def test_the_file_is_what_the_command_writes():
    assert json.loads(FILE.read_text()) == describe(), "run: strongroom openapi --out docs/openapi.json"


def test_every_route_is_described_and_no_other():
    deps: Any = SimpleNamespace(traffic=None, models=None, access=None, guard=None, receipts=None, stored=None)
    deps.ready, deps.cors_origins = bool, ()
    edge = build_public(cast("PublicDeps", deps))
    assert isinstance(edge, Edge)
    app: Any = edge._app
    served = {
        (method.lower(), route.path.replace(":path}", "}")) for route in app.routes for method in route.methods or ()
    }
    described = {(method, path) for path, methods in describe()["paths"].items() for method in methods}
    assert described == served - {("head", "/livez"), ("head", "/readyz")}
