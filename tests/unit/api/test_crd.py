"""The CRD as a document: structural, complete, and the one that is committed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from otj_operator.crd.__main__ import rendered
from otj_operator.crd.check import violations
from otj_operator.crd.definition import COLUMNS, custom_resource_definition, object_schema
from otj_operator.crd.schema import structural_schema, told
from otj_runtime.api import Algorithm, ApiModel, OnlineTrainingJobSpec, parse_job, training_arguments
from otj_runtime.api.lifecycle import CHANGEABLE, FIXED
from tests.unit.api.specs import VALID

Object = dict[str, Any]

REPOSITORY = Path(__file__).parents[3]


@pytest.mark.parametrize("name", sorted(rendered()))
def test_the_committed_file_is_the_generated_one(name: str) -> None:
    assert (REPOSITORY / name).read_text() == rendered()[name], "run `make generate` and commit the result"


def test_the_schema_is_structural_and_every_field_is_described() -> None:
    assert list(violations(object_schema())) == []


def test_the_crd_is_small_enough_for_client_side_apply() -> None:
    assert len(json.dumps(custom_resource_definition())) < 128 * 1024


def test_kubectl_get_shows_the_run_at_a_glance() -> None:
    shown = [title.upper() for title, _, _, priority in COLUMNS if priority == 0]
    assert shown == ["ALGORITHM", "GPUS", "STATE", "STEP", "REWARD", "AGE"]


def test_a_message_shows_its_values_and_escapes_its_quotes() -> None:
    assert told("plain") == {"message": "plain"}
    assert told("it's %d", "self.gpus") == {"messageExpression": "'it\\'s %d'.format([self.gpus])"}


def test_every_field_either_may_change_or_says_why_not() -> None:
    assert {*CHANGEABLE, *FIXED} == {field.alias for field in OnlineTrainingJobSpec.model_fields.values()}
    assert not set(CHANGEABLE) & FIXED.keys()


def test_every_column_shows_a_field_of_the_schema() -> None:
    for _, _, path, _ in COLUMNS:
        node: Object = {"properties": {"metadata": {"properties": {"creationTimestamp": {}}}} | _without_metadata()}
        for part in path.removeprefix(".").split("."):
            node = node["properties"][part]


def test_server_side_defaults_are_those_of_the_models() -> None:
    filled = _filled(VALID["spec"], object_schema()["properties"]["spec"])
    assert parse_job(VALID | {"spec": filled}).spec == parse_job(VALID).spec
    assert filled["generation"] == {
        "gpus": 1,
        "gpuMemoryUtilization": 0.9,
        "weightTransfer": "auto",
        "enablePrefixCaching": True,
        "readyTimeoutSeconds": 900,
    }


def test_no_default_fills_a_required_object() -> None:
    properties = object_schema()["properties"]["spec"]["properties"]
    assert "default" not in properties["model"]
    assert "default" not in properties["dataset"]


def test_every_training_argument_is_a_property_of_its_type() -> None:
    properties = object_schema()["properties"]["spec"]["properties"]["training"]["properties"]
    for name, argument in training_arguments().items():
        if len(argument.types) == 1:
            assert properties[name]["type"] == argument.types[0]
        else:
            assert properties[name]["x-kubernetes-preserve-unknown-fields"] is True


def test_every_rule_has_a_message() -> None:
    rules = [rule for node in _nodes(object_schema()) for rule in node.get("x-kubernetes-validations", [])]
    assert len(rules) > len(Algorithm) + len(OnlineTrainingJobSpec.rules)
    assert all(rule.get("message") or rule["messageExpression"] for rule in rules)


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"properties": {}}, ".: has no type"),
        ({"type": "object", "properties": {"a": {"type": "string"}}}, ".a: has no description"),
        ({"type": "object", "anyOf": []}, ".: anyOf is not allowed in a structural schema"),
        ({"type": "object", "additionalProperties": False}, ".: additionalProperties must be a schema"),
        (
            {"type": "object", "properties": {}, "additionalProperties": {"type": "string"}},
            ".: properties and additionalProperties exclude each other",
        ),
        ({"type": "integer", "exclusiveMinimum": 0}, ".: exclusiveMinimum and exclusiveMaximum must be booleans"),
        ({"type": "array"}, ".: an array needs items"),
        ({"type": "string", "default": None}, ".: default must not be null"),
        (
            {"type": "object", "properties": {"metadata": {"type": "object", "description": "x"}}},
            ".metadata: the API server specifies it, only `type: object` is allowed",
        ),
        (
            {"type": "array", "x-kubernetes-list-map-keys": ["name"], "items": {"type": "object", "properties": {}}},
            ".: the list's key name must be a required property of its items",
        ),
    ],
)
def test_the_checker_finds_what_the_api_server_would_refuse(schema: Object, fault: str) -> None:
    assert fault in list(violations(schema))


def test_a_model_that_contains_itself_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Tree.*a structural schema cannot contain itself"):
        structural_schema(Tree, defaults=False)


class Tree(ApiModel):
    child: Tree | None = None


def _without_metadata() -> Object:
    return {name: schema for name, schema in object_schema()["properties"].items() if name != "metadata"}


def _nodes(schema: Object) -> Iterator[Object]:
    yield schema
    for child in schema.get("properties", {}).values():
        yield from _nodes(child)
    if isinstance(schema.get("items"), dict):
        yield from _nodes(schema["items"])


def _filled(value: Any, schema: Object) -> Any:
    """`value` with defaults filled in as the API server does it."""
    if not isinstance(value, dict):
        return value
    filled = dict(value)
    for name, child in schema.get("properties", {}).items():
        if name not in filled and "default" in child:
            filled[name] = child["default"]
        if name in filled:
            filled[name] = _filled(filled[name], child)
    return filled
