"""Requests made from the OpenAPI description, good and bad: no 500, no status and no body that it does not name."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from benchmarks.gateway.kit import EMBEDDER, MODEL

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def described() -> dict[str, Any]:
    """The description, its model names narrowed to those that are served: others are a 404, and nothing is learnt."""
    whole: dict[str, Any] = copy.deepcopy(json.loads(Path("docs/openapi.json").read_text()))
    for name, schema in whole["components"]["schemas"].items():
        if name.endswith("Request") and "model" in schema["properties"]:
            schema["properties"]["model"] = {"enum": [EMBEDDER if name == "EmbeddingRequest" else MODEL]}
    return whole


@pytest.fixture(scope="module")
def session():
    with requests.Session() as one:
        yield one


schema = schemathesis.openapi.from_dict(described())


@schema.parametrize()
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_the_server_keeps_to_the_description(case, gateway, key, session):
    headers = {"authorization": f"Bearer {key}"}
    case.call_and_validate(base_url=gateway.base, headers=headers, checks=CHECKS, session=session, timeout=30)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_server_keeps_to_the_description_at_length(case, gateway, key, session):
    headers = {"authorization": f"Bearer {key}"}
    case.call_and_validate(base_url=gateway.base, headers=headers, checks=CHECKS, session=session, timeout=30)
