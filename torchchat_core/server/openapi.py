"""The OpenAPI document, made of the same declarations that requests are checked by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from torchchat_core import __version__
from torchchat_core.server.body import Body

REFERENCE = "#/components/schemas/{model}"
ERROR = {"type": "object", "required": ["error"], "properties": {"error": {
    "type": "object", "required": ["message", "type", "param", "code"], "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]}}}}}
STATUSES = {"400": "A field is wrong, unknown or not supported; `param` names it.", "401": "The API key is missing.",
            "404": "There is no such model.", "408": "The request came too slowly.", "413": "The body is too large.",
            "415": "The body is not declared as JSON.", "429": "Too many answers wait.",
            "503": "The model cannot be loaded.", "504": "The time for the answer is over."}
READING = {"/v1/models": "The models.", "/v1/models/{name}": "One model.", "/health": "Whether the server is up.",
           "/metrics": "Figures for Prometheus."}


def document(endpoints: Mapping[str, type[Body]], models: Sequence[str]) -> dict[str, Any]:
    """OpenAPI 3.1. `endpoints`: path -> the body of its POST requests; `models`: names that requests may give."""
    kinds = list(dict.fromkeys(endpoints.values()))
    references, definitions = models_json_schema([(kind, "validation") for kind in kinds], ref_template=REFERENCE)
    schemas = {**definitions.get("$defs", {}), "Error": ERROR}
    for kind in kinds:
        named = schemas[kind.__name__]["properties"]["model"]
        schemas[kind.__name__]["properties"]["model"] = {**named, "enum": list(models)} if "type" in named else {
            **named, "anyOf": [{"type": "string", "enum": list(models)}, {"type": "null"}]}
    paths: dict[str, Any] = {path: {"post": _operation(path, kind, references[kind, "validation"])}
                             for path, kind in endpoints.items()}
    paths |= {path: {"get": _reading(path, summary, models)} for path, summary in READING.items()}
    return {"openapi": "3.1.0", "info": {"title": "torchchat", "version": __version__}, "paths": paths,
            "components": {"schemas": schemas,
                           "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
            "security": [{"key": []}, {}]}


def _operation(path: str, kind: type[Body], schema: Any) -> dict[str, Any]:
    good: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if "stream" in kind.model_fields:
        good["text/event-stream"] = {"schema": {"type": "object"}}
    return {"operationId": kind.__name__, "summary": (kind.__doc__ or path).splitlines()[0],
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": {"200": {"description": "The answer.", "content": good}, **_errors(STATUSES)}}


def _reading(path: str, summary: str, models: Sequence[str]) -> dict[str, Any]:
    kind = "text/plain" if path == "/metrics" else "application/json"
    schema = {"type": "string"} if path == "/metrics" else {"type": "object"}
    found: dict[str, Any] = {"summary": summary, "responses": {
        "200": {"description": summary, "content": {kind: {"schema": schema}}}, **_errors({"401": STATUSES["401"]})}}
    if "{name}" in path:
        found["parameters"] = [{"name": "name", "in": "path", "required": True,
                                "schema": {"type": "string", "enum": list(models)}}]
        found["responses"] |= _errors({"404": STATUSES["404"]})
    return found


def _errors(statuses: Mapping[str, str]) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": REFERENCE.format(model="Error")}}}
    return {status: {"description": text, "content": content} for status, text in statuses.items()}
