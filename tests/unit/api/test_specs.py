"""The Python side of the API: what `otj run` and the operator refuse, before any pod exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from otj_runtime.api import Device, DType, InvalidJobError, load_job, parse_job
from tests.unit.api.specs import (
    HARMLESS_WORDS,
    INVALID,
    NO_SECRET_ARGUMENTS,
    NO_SECRETS,
    REFUSED_BY_THE_OPERATOR,
    SCRIPT,
    VALID,
    Invalid,
    changed,
)

SAMPLES = sorted((Path(__file__).parents[3] / "manifests" / "samples").glob("*.yaml"))


@pytest.mark.parametrize("case", [*INVALID, *REFUSED_BY_THE_OPERATOR], ids=lambda case: case.name)
def test_an_invalid_spec_is_refused_with_the_field_and_the_fix(case: Invalid) -> None:
    with pytest.raises(InvalidJobError) as refused:
        parse_job(case.document())
    assert (case.field or case.message) in str(refused.value)


def test_there_are_as_many_invalid_specs_as_there_should_be() -> None:
    assert len({case.name for case in INVALID}) == len(INVALID) >= 100


def test_the_message_about_groups_holds_the_numbers() -> None:
    with pytest.raises(InvalidJobError, match=r"training\.num_generations: 6 does not divide the 16 completions of a rank"):
        parse_job(changed({"training.num_generations": 6, "training.steps_per_generation": 2}))


def test_every_fault_of_a_spec_is_told_at_once() -> None:
    with pytest.raises(InvalidJobError) as refused:
        parse_job(changed({"algorithm": "PPO", "nodes": 2, "gpu": 3}))
    assert [line.split(":")[0] for line in str(refused.value).splitlines()] == ["spec.algorithm", "spec.nodes", "spec.gpu"]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_a_sample_is_a_valid_job(path: Path) -> None:
    assert load_job(path).spec.gpus >= 2


def test_what_is_only_called_like_a_secret_passes() -> None:
    env = [{"name": name, "value": value} for name, value in NO_SECRETS.items()]
    assert len(parse_job(changed({"env": env})).spec.env) == len(env)
    assert parse_job(changed({"dataset": None, "trainer.command": [*SCRIPT, *HARMLESS_WORDS]})).spec.trainer is not None
    (reward,) = parse_job(changed({"rewards": [{"function": "a.b", "args": NO_SECRET_ARGUMENTS}]})).spec.rewards
    assert reward.args == NO_SECRET_ARGUMENTS


def test_another_kind_is_refused_by_name() -> None:
    with pytest.raises(InvalidJobError, match=r"expected apiVersion onlinetraining\.dev/v1alpha1 .* found batch/v1 Job"):
        parse_job(VALID | {"apiVersion": "batch/v1", "kind": "Job"})


@pytest.mark.parametrize(
    ("changes", "resource", "dtype"),
    [
        ({}, "nvidia.com/gpu", DType.BFLOAT16),
        ({"accelerator.device": "cpu"}, None, DType.FLOAT32),
        ({"accelerator": {"device": "cpu", "resourceName": "example.com/fake"}}, "example.com/fake", DType.FLOAT32),
        ({"generation.dtype": "float16"}, "nvidia.com/gpu", DType.FLOAT16),
    ],
)
def test_defaults_that_depend_on_the_device_are_resolved(changes: dict[str, Any], resource: str | None, dtype: DType) -> None:
    spec = parse_job(changed(changes)).spec
    assert (spec.accelerator_resource, spec.generator_dtype) == (resource, dtype)


def test_the_device_is_cuda_unless_the_user_says_otherwise() -> None:
    assert parse_job(VALID).spec.accelerator.device is Device.CUDA


def test_a_job_survives_the_way_to_the_api_server_and_back() -> None:
    job = parse_job(changed({"training.num_generations": 4, "env": [{"name": "A", "value": "1"}]}))
    assert parse_job(job.to_wire()) == job
