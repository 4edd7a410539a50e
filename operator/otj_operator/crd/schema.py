"""From a pydantic model to a structural schema, the subset of JSON Schema that the API server takes.

    model --pydantic--> JSON Schema with $defs, anyOf null, additionalProperties: false
          --inline----> one tree
          --clean-----> only keywords of the subset, x-kubernetes-* where the subset has no word for it

An object that is always there and whose fields have defaults gets the default {}, because the API server fills defaults only into objects that
are there. Rules of a model become x-kubernetes-validations at the place where the model stands.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from otj_runtime.api import ApiModel, Rule

Schema = dict[str, Any]

KEPT = (
    "description",
    "type",
    "format",
    "enum",
    "pattern",
    "default",
    "minimum",
    "exclusiveMinimum",
    "maximum",
    "exclusiveMaximum",
    "multipleOf",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "maxProperties",
    "required",
    "properties",
    "items",
    "additionalProperties",
)
"""Keywords of the subset that our models use, in the order in which they are written."""


class _Generator(GenerateJsonSchema):
    """Pydantic's generator without null, which in Kubernetes is spelt by leaving a field out, and with the rules of models."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        generated = super().model_schema(schema)
        if issubclass(schema["cls"], ApiModel) and schema["cls"].rules:
            generated["x-kubernetes-validations"] = [validation(rule) for rule in schema["cls"].rules]
        return generated


def validation(rule: Rule) -> Schema:
    """One entry of x-kubernetes-validations."""
    where = {"fieldPath": f".{rule.field}"} if rule.field else {}
    return {"rule": rule.cel, **told(rule.message, *rule.cel_values), **where}


def told(message: str, *values: str) -> Schema:
    """The message of a validation, its %s and %d filled with CEL expressions. By `format`, because of a number that is turned into text
    in another way the API server does not know the length, and reckons the rule too expensive."""
    if not values:
        return {"message": message}
    quoted = message.replace("\\", "\\\\").replace("'", "\\'")
    return {"messageExpression": f"'{quoted}'.format([{', '.join(values)}])"}


def structural_schema(model: type[ApiModel], *, defaults: bool) -> Schema:
    """The structural schema of `model`, with server-side defaults or without them.

    Raises:
        ValueError: if the model contains itself, which no structural schema can.
    """
    document = model.model_json_schema(by_alias=True, schema_generator=_Generator)
    tree = _inline(document, document.get("$defs", {}), ())
    return _clean(tree, defaults=defaults)


def preserving() -> Schema:
    """An object whose fields the API server keeps without knowing them."""
    return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def _inline(node: Any, definitions: dict[str, Schema], path: tuple[str, ...]) -> Any:
    """`node` with every $ref replaced by what it names; keywords beside the $ref win."""
    if isinstance(node, list):
        return [_inline(item, definitions, path) for item in node]
    if not isinstance(node, dict):
        return node
    reference = node.get("$ref")
    if reference is not None:
        name = reference.removeprefix("#/$defs/")
        if name in path:
            raise ValueError(f"{' -> '.join([*path, name])}: a structural schema cannot contain itself")
        beside = {key: value for key, value in node.items() if key != "$ref"}
        return _inline(definitions[name] | beside, definitions, (*path, name))
    return {key: _inline(value, definitions, path) for key, value in node.items() if key != "$defs"}


def _clean(node: Schema, *, defaults: bool) -> Schema:
    """`node` with the subset's keywords only."""
    clean = {key: node[key] for key in KEPT if key in node and key not in ("properties", "items", "additionalProperties", "default")}
    for bound in ("minimum", "maximum"):
        exclusive = f"exclusive{bound.capitalize()}"
        if exclusive in clean:  # JSON Schema's later drafts put the bound itself there, the subset a boolean
            clean |= {bound: clean[exclusive], exclusive: True}
    if "properties" in node:
        clean["properties"] = {
            name: _property(child, required=name in node.get("required", ()), defaults=defaults)
            for name, child in node["properties"].items()
        }
    if "items" in node:
        clean["items"] = _items(node, defaults=defaults)
    if node.get("additionalProperties") is True:
        clean |= preserving()
    elif isinstance(node.get("additionalProperties"), dict):
        clean["additionalProperties"] = _clean(node["additionalProperties"], defaults=defaults)
    return clean | {key: value for key, value in node.items() if key.startswith("x-kubernetes-")}


def _property(node: Schema, *, required: bool, defaults: bool) -> Schema:
    clean = _clean(node, defaults=defaults)
    if defaults and not required and (value := _default(node, clean)) is not None:
        clean["default"] = value
    return clean


def _items(node: Schema, *, defaults: bool) -> Schema:
    items = _clean(node["items"], defaults=defaults)
    keys = node.get("x-kubernetes-list-map-keys", [])
    if "properties" not in items and keys:
        # The keys of a list map must be declared, also where the entries are otherwise opaque.
        items |= {"required": list(keys), "properties": {key: {"type": "string", "description": "Key of the entry."} for key in keys}}
    return items


def _default(node: Schema, clean: Schema) -> Any:
    if "default" in node:  # null where the field may be absent altogether
        return node["default"]
    fields = clean.get("properties", {}).values()
    if not clean.get("required") and any("default" in field for field in fields):
        return {}
    return None
