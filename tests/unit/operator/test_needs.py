"""An operator on another release's CRD says what is wrong with it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from otj_operator.crd.definition import NAME, custom_resource_definition, object_schema
from otj_operator.crd.needs import fault
from otj_runtime.api import VERSION

Object = dict[str, Any]


def found(crd: Object | None) -> str | None:
    return fault(crd, name=NAME, version=VERSION, needed=object_schema())


@pytest.fixture
def crd() -> Object:
    return copy.deepcopy(custom_resource_definition())


def status_of(crd: Object) -> Object:
    properties: Object = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
    return properties


def test_its_own_crd_is_the_one_it_needs(crd: Object) -> None:
    assert found(crd) is None


def test_a_newer_crd_will_do(crd: Object) -> None:
    status_of(crd)["news"] = {"type": "string"}
    assert found(crd) is None


def test_a_missing_crd_is_named_with_what_to_apply() -> None:
    assert found(None) == f"the cluster does not serve {NAME} {VERSION}: apply manifests/crd.yaml first"


def test_a_field_that_the_server_would_drop_is_named(crd: Object) -> None:
    del status_of(crd)["progress"]["properties"]["steps"]
    sentence = found(crd)
    assert sentence is not None
    assert "it lacks .status.progress.steps; apply the manifests/crd.yaml of this operator's release" in sentence


def test_a_field_of_another_type_is_named(crd: Object) -> None:
    status_of(crd)["restarts"]["type"] = "string"
    assert ".status.restarts as integer" in (found(crd) or "")


def test_a_version_that_is_not_served_is_none(crd: Object) -> None:
    crd["spec"]["versions"][0]["served"] = False
    assert "does not serve" in (found(crd) or "")
