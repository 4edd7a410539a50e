"""Options of `otj run`."""

from __future__ import annotations

import re
from typing import Any

import pytest

from otj_runtime.api import InvalidJobError
from otj_runtime.local.options import UsageError, override, pairs


@pytest.mark.parametrize(
    ("assignment", "spec"),
    [
        ("training.max_steps=5", {"gpus": 2, "training": {"max_steps": 5}}),
        ("spec.gpus=3", {"gpus": 3}),
        ("rewards=[{function: a.b}]", {"gpus": 2, "rewards": [{"function": "a.b"}]}),
        ("model={path: /x}", {"gpus": 2, "model": {"path": "/x"}}),
        ("training.lr=1.0e-3", {"gpus": 2, "training": {"lr": 1e-3}}),
        ("image=a=b", {"gpus": 2, "image": "a=b"}),
    ],
)
def test_set_replaces_a_field_with_a_yaml_value(assignment: str, spec: dict[str, Any]) -> None:
    assert override({"spec": {"gpus": 2}}, [assignment])["spec"] == spec


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("gpus", "write path=value"),
        ("gpus.count=1", "gpus is no group of fields"),
        ("training={", "'{' is no YAML value"),
    ],
)
def test_a_set_that_makes_no_sense_is_refused(assignment: str, message: str) -> None:
    with pytest.raises(InvalidJobError, match=re.escape(f"--set {assignment}: ") + ".*" + re.escape(message)):
        override({"spec": {"gpus": 2}}, [assignment])


def test_pairs_split_at_the_first_equals_sign() -> None:
    assert pairs(["A=1", "B=x=y", "C="], option="--env") == {"A": "1", "B": "x=y", "C": ""}


@pytest.mark.parametrize("text", ["A", "=1"])
def test_a_pair_without_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=f"--env {text}: write NAME=VALUE"):
        pairs([text], option="--env")
