"""Every field that a user may set is seen in the Job: a field that nothing reads would be a promise that nobody keeps."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pytest

from otj_runtime.api import ApiModel, OnlineTrainingJobSpec, parse_job
from otj_runtime.pod.manifest import build_job
from tests.unit.api.specs import SCRIPT, changed

Object = dict[str, Any]

DATA: Object = {"dataset": {"name": "org/data"}, "rewards": [{"function": "my.reward"}], "generation.gpus": 2}
"""What the values below are set in."""


def reward(**fields: Any) -> Object:
    return {"rewards": [{"function": "my.reward"} | fields]}


def judge(**fields: Any) -> Object:
    return {"rewards": [{"judge": {"url": "http://host/v1", "model": "m"} | fields}]}


def script(word: str) -> Object:
    return {"dataset": None, "rewards": [], "trainer.command": [*SCRIPT, word]}


SIMPLE: Object = {
    "algorithm": "OnlineDPO",
    "model.name": "org/model",
    "model.revision": "v2",
    "model.dtype": "bfloat16",
    "dataset.name": "org/other",
    "dataset.split": "test",
    "dataset.evalSplit": "validation",
    "dataset.streaming": True,
    "dataset.columns": {"prompt": "question"},
    "dataset.args": {"seed": 3},
    "gpus": 6,
    "generation.gpus": 1,
    "generation.tensorParallelSize": 1,
    "generation.gpuMemoryUtilization": 0.5,
    "generation.maxModelLen": 4096,
    "generation.dtype": "float16",
    "generation.weightTransfer": "delta",
    "generation.enablePrefixCaching": False,
    "generation.extraArgs": ["--seed", "7"],
    "generation.readyTimeoutSeconds": 77,
    "rollout.staleness": 1,
    "rollout.stragglerFactor": 3,
    "training": {"learning_rate": 0.1},
    "lora.rank": 4,
    "lora.alpha": 8,
    "lora.targetModules": ["q_proj"],
    "lora.sync": "adapter",
    "lora.export": "merged",
    "accelerate.mixedPrecision": "bf16",
    "accelerate.strategy": "fsdp2",
    "accelerate.config": {"fsdp_offload_params": True},
    "image": "registry.example/runtime:1",
    "imagePullPolicy": "Always",
    "resources.trainer": {"limits": {"memory": "1Gi"}},
    "resources.generator": {"limits": {"memory": "1Gi"}},
    "resources.sharedMemory": "8Gi",
    "volumes": [{"name": "v", "emptyDir": {}}],
    "volumeMounts": [{"name": "v", "mountPath": "/v"}],
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
    "serviceAccountName": "trainer",
    "output.claimName": "results",
    "output.path": "/results",
    "output.saveSteps": 7,
    "accelerator.device": "cpu",
    "accelerator.resourceName": "example.com/gpu",
    "suspend": True,
    "backoffLimit": 9,
    "activeDeadlineSeconds": 60,
    "ttlSecondsAfterFinished": 60,
}
"""A value of a field that no other need give way to."""

OTHERS: dict[str, tuple[Object, Object]] = {
    "model.path": ({"model": {"path": "/models/a"}}, {"model": {"path": "/models/b"}}),
    "dataset.task": ({"dataset": {"task": "copy"}}, {"dataset": {"task": "reverse"}}),
    "dataset.path": ({"dataset": {"path": "/data/a"}}, {"dataset": {"path": "/data/b"}}),
    "rewards.function": (reward(), reward(function="my.other")),
    "rewards.model": ({"rewards": [{"model": "a"}]}, {"rewards": [{"model": "b"}]}),
    "rewards.weight": (reward(), reward(weight=0.5)),
    "rewards.args": (reward(), reward(args={"scale": 3})),
    "rewards.timeoutSeconds": (reward(), reward(timeoutSeconds=9)),
    "rewards.judge.url": (judge(), judge(url="http://other/v1")),
    "rewards.judge.model": (judge(), judge(model="n")),
    "rewards.judge.apiKeyEnv": (judge(), judge(apiKeyEnv="JUDGE_KEY")),
    "rewards.judge.template": (judge(), judge(template="{prompt} {a} {b}")),
    "rewards.judge.bothOrders": (judge(), judge(bothOrders=False)),
    "rewards.judge.maxTokens": (judge(), judge(maxTokens=9)),
    "rewards.judge.maxConcurrency": (judge(), judge(maxConcurrency=9)),
    "rewards.judge.timeoutSeconds": (judge(), judge(timeoutSeconds=9)),
    "rewards.judge.maxRetries": (judge(), judge(maxRetries=9)),
    "rewards.judge.request": (judge(), judge(request={"seed": 1})),
    "trainer.command": (script("--a"), script("--b")),
    "env.name": ({"env": [{"name": "A", "value": "1"}]}, {"env": [{"name": "B", "value": "1"}]}),
    "env.value": ({"env": [{"name": "A", "value": "1"}]}, {"env": [{"name": "A", "value": "2"}]}),
}
"""Fields of lists, and those that exclude others: without and with a change."""

NOT_SEEN = {"nodes": "has one value in this version", "managedBy": "says who makes the Job"}

CASES = OTHERS | {path: ({"lora": {}} if path.startswith("lora.") else {}, {path: value}) for path, value in SIMPLE.items()}


@pytest.mark.parametrize("path", sorted(CASES))
def test_a_field_that_is_set_changes_the_job(path: str) -> None:
    without, set_to = CASES[path]
    assert child(without) != child(without | set_to)


def test_no_field_is_left_out() -> None:
    assert {*CASES, *NOT_SEEN} == set(fields(OnlineTrainingJobSpec))


def child(changes: Object) -> Object:
    return build_job(parse_job(changed(DATA | changes)), default_image="x")


def fields(model: type[ApiModel], path: str = "") -> Iterator[str]:
    """Paths of all fields, those of lists without a number."""
    for field in model.model_fields.values():
        inner = list(models_in(field.annotation))
        if inner:
            yield from fields(inner[0], f"{path}{field.alias}.")
        else:
            yield f"{path}{field.alias}"


def models_in(annotation: Any) -> Iterator[type[ApiModel]]:
    if isinstance(annotation, type) and issubclass(annotation, ApiModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from models_in(argument)
