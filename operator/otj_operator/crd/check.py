"""What makes a schema structural, checked without a server: a violation is found by a unit test, not by an admin's `kubectl apply`."""

from __future__ import annotations

from collections.abc import Iterator

from otj_operator.crd.schema import Schema

_FORBIDDEN = frozenset(
    {
        *("$ref", "$defs", "definitions", "allOf", "anyOf", "oneOf", "not", "const", "discriminator", "dependencies"),
        *("patternProperties", "prefixItems", "uniqueItems", "deprecated", "examples", "id", "title", "readOnly", "writeOnly", "xml"),
    }
)


def violations(schema: Schema, path: str = "") -> Iterator[str]:
    """What is wrong with `schema` and everything in it, one line per fault, each starting with the path of the node."""
    for fault in _faults(schema):
        yield f"{path or '.'}: {fault}"
    for name, child in schema.get("properties", {}).items():
        if (path, name) == ("", "metadata"):
            if child != {"type": "object"}:
                yield ".metadata: the API server specifies it, only `type: object` is allowed"
        elif not child.get("description"):
            yield f"{path}.{name}: has no description"
        yield from violations(child, f"{path}.{name}")
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), dict):
            yield from violations(schema[keyword], f"{path}.{keyword}")


def _faults(schema: Schema) -> Iterator[str]:
    for keyword in _FORBIDDEN & schema.keys():
        yield f"{keyword} is not allowed in a structural schema"
    opaque = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-int-or-string")
    if "type" not in schema and not opaque:
        yield "has no type"
    if "properties" in schema and "additionalProperties" in schema:
        yield "properties and additionalProperties exclude each other"
    if isinstance(schema.get("additionalProperties"), bool):
        yield "additionalProperties must be a schema"
    if "default" in schema and schema["default"] is None:
        yield "default must not be null"
    if isinstance(schema.get("exclusiveMinimum", True), bool) is False or isinstance(schema.get("exclusiveMaximum", True), bool) is False:
        yield "exclusiveMinimum and exclusiveMaximum must be booleans"
    if schema.get("type") == "array" and "items" not in schema:
        yield "an array needs items"
    for key in schema.get("x-kubernetes-list-map-keys", []):
        items = schema.get("items", {})
        if key not in items.get("properties", {}) or key not in items.get("required", []):
            yield f"the list's key {key} must be a required property of its items"
