"""Every field of the spec reaches the child: the Job that the operator made of a spec that sets them all."""

from __future__ import annotations

import json
from typing import Any

import pytest

from otj_runtime.api import OnlineTrainingJobSpec
from otj_runtime.api.lifecycle import OPERATOR
from tests.contract.apiserver import ApiServer
from tests.contract.operator_process import IMAGE
from tests.contract.runs import Run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("operator")]

Object = dict[str, Any]

TOLERATION = {"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}
AFFINITY = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
        }
    }
}
SECRET = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
VOLUME = {"name": "data", "persistentVolumeClaim": {"claimName": "data", "readOnly": True}}
MOUNT = {"name": "data", "mountPath": "/data", "readOnly": True}

EVERYTHING: Object = {
    "algorithm": "OnlineDPO",
    "model": {"name": "org/model", "revision": "v2", "dtype": "bfloat16"},
    "dataset": {"path": "/data/prompts.jsonl", "split": "test", "columns": {"prompt": "question"}},
    "rewards": [{"function": "mine.rewards.score", "weight": 0.5, "args": {"scale": 3}}],
    "gpus": 8,
    "nodes": 1,
    "generation": {
        "gpus": 2,
        "tensorParallelSize": 1,
        "gpuMemoryUtilization": 0.7,
        "maxModelLen": 4096,
        "dtype": "float16",
        "weightTransfer": "delta",
        "enablePrefixCaching": False,
        "extraArgs": ["--seed", "7"],
        "readyTimeoutSeconds": 77,
    },
    "rollout": {"staleness": 2, "stragglerFactor": 3},
    "training": {"learning_rate": 1e-6, "max_steps": 20, "beta": 0.2},
    "accelerate": {"mixedPrecision": "bf16", "strategy": "fsdp2", "config": {"fsdp_offload_params": True}},
    "lora": {"rank": 4, "sync": "merged"},
    "image": "registry.example/runtime@sha256:1",
    "imagePullPolicy": "Always",
    "resources": {
        "trainer": {"requests": {"cpu": "4"}, "limits": {"memory": "64Gi"}},
        "generator": {"requests": {"cpu": "2"}},
        "sharedMemory": "8Gi",
    },
    "env": [SECRET],
    "volumes": [VOLUME],
    "volumeMounts": [MOUNT],
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [TOLERATION],
    "affinity": AFFINITY,
    "priorityClassName": "high",
    "serviceAccountName": "trainer",
    "output": {"claimName": "results", "path": "/results", "saveSteps": 5},
    "accelerator": {"device": "cuda", "resourceName": "example.com/gpu"},
    "suspend": True,
    "backoffLimit": 1,
    "activeDeadlineSeconds": 3600,
    "ttlSecondsAfterFinished": 60,
    "managedBy": OPERATOR,
}


@pytest.fixture(scope="module")
def job(server: ApiServer, operator: None) -> Object:
    return Run(server, "everything", EVERYTHING).created()


@pytest.fixture
def pod(job: Object) -> Object:
    spec: Object = job["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def containers(pod: Object) -> dict[str, Object]:
    return {c["name"]: c for c in [*pod["initContainers"], *pod["containers"]]}


def test_this_test_sets_every_field_of_the_spec() -> None:
    assert EVERYTHING.keys() | {"trainer"} == {field.alias for field in OnlineTrainingJobSpec.model_fields.values()}


def test_the_limits_of_the_run_are_the_jobs(job: Object) -> None:
    spec = job["spec"]
    assert (spec["suspend"], spec["backoffLimit"], spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"]) == (True, 1, 3600, 60)


def test_placement_is_the_pods(pod: Object) -> None:
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [TOLERATION]
    assert pod["affinity"] == AFFINITY
    assert (pod["priorityClassName"], pod["serviceAccountName"]) == ("high", "trainer")


def test_the_accelerators_are_split_between_the_containers(containers: dict[str, Object]) -> None:
    assert containers["generator"]["resources"]["limits"] == {"example.com/gpu": "2"}
    assert containers["trainer"]["resources"]["limits"] == {"example.com/gpu": "6", "memory": "64Gi"}
    assert containers["trainer"]["resources"]["requests"] == {"example.com/gpu": "6", "cpu": "4"}
    assert "resources" not in containers["model"] or not containers["model"]["resources"]


def test_image_environment_and_mounts_are_every_containers(containers: dict[str, Object]) -> None:
    assert set(containers) == {"model", "generator", "trainer"}
    for container in containers.values():
        assert (container["image"], container["imagePullPolicy"]) == ("registry.example/runtime@sha256:1", "Always")
        assert container["env"][-1] == SECRET
        assert container["volumeMounts"][-1] == MOUNT
        assert {"name": "output", "mountPath": "/results"} in container["volumeMounts"]


def test_volumes_are_the_pods(pod: Object) -> None:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["data"] == VOLUME
    assert volumes["output"] == {"name": "output", "persistentVolumeClaim": {"claimName": "results"}}
    assert volumes["shared-memory"] == {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}


def test_the_generators_settings_are_vllms_arguments(containers: dict[str, Object]) -> None:
    command = containers["generator"]["command"]
    expected = {
        "--dtype": "float16",
        "--tensor-parallel-size": "1",
        "--data-parallel-size": "2",
        "--gpu-memory-utilization": "0.7",
        "--max-model-len": "4096",
        "--seed": "7",
    }
    assert {flag: command[command.index(flag) + 1] for flag in expected} == expected
    assert "--no-enable-prefix-caching" in command


def test_what_the_launcher_must_know_is_in_its_configuration(containers: dict[str, Object]) -> None:
    environment = {e["name"]: e.get("value") for e in containers["trainer"]["env"]}
    config = json.loads(environment["OTJ_CONFIG"])
    for name in ("algorithm", "training", "accelerate", "rollout", "rewards"):
        assert config[name] == EVERYTHING[name]
    assert config["lora"]["rank"] == 4
    assert config["weightTransfer"] == "delta"
    assert EVERYTHING["dataset"].items() <= config["dataset"].items()
    expected = {
        "modelName": "org/model",
        "modelRevision": "v2",
        "modelDtype": "bfloat16",
        "device": "cuda",
        "trainingRanks": 6,
        "generatorGpus": 2,
        "generatorReadyTimeoutSeconds": 77,
        "output": "/results",
        "saveSteps": 5,
    }
    assert expected.items() <= config.items()


def test_a_job_that_names_no_image_gets_the_operators(server: ApiServer) -> None:
    template = Run(server, "plain").created()["spec"]["template"]["spec"]
    assert {c["image"] for c in [*template["initContainers"], *template["containers"]]} == {IMAGE}
