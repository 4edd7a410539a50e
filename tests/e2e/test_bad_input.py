"""Mistakes of users: refused by `kubectl apply` where the API can know, else `Failed` with a reason, soon, and nothing held."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest
import yaml

from tests.e2e.cluster import SAMPLES, Cluster, Object, eventually

pytestmark = pytest.mark.e2e

FAIL_SECONDS = 60
"""From the pod's start to `Failed`: what users were promised."""
WAIT_SECONDS = 300.0


def changed(name: str, change: dict[str, Any]) -> Object:
    """grpo-copy.yaml on two GPUs with other fields in its spec; fields of `training` are merged."""
    job: Object = yaml.safe_load((SAMPLES / "grpo-copy.yaml").read_text())
    job["metadata"]["name"] = name
    training = job["spec"]["training"] | change.get("training", {})
    job["spec"] |= {"gpus": 2} | change | {"training": training}
    return job


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("one-gpu", {"gpus": 1}, "gpus: 1 is too few, it needs at least 2: one generates, the others train"),
        ("algorithm", {"algorithm": "PPO"}, 'spec.algorithm: Unsupported value: "PPO": supported values: "GRPO", "OnlineDPO"'),
        ("unknown-argument", {"training": {"learning_rte": 1.0e-3}}, 'unknown field "spec.training.learning_rte"'),
        ("indivisible", {"training": {"num_generations": 7}}, "training.num_generations: 7 does not divide the"),
        ("model-twice", {"model": {"name": "a/b", "path": "/models/b"}}, "give exactly one of model.name"),
    ],
)
def test_what_the_api_can_know_is_refused_at_apply(cluster: Cluster, name: str, change: dict[str, Any], words: str) -> None:
    said = cluster.refused("apply", "-f", "-", stdin=json.dumps(changed(name, change)))
    assert words in said
    assert len(said.splitlines()) <= 3, f"one mistake, one message:\n{said}"
    assert cluster.kubectl("get", "otj", name, "--ignore-not-found") == ""


@pytest.mark.parametrize(
    ("name", "change", "reason", "words"),
    [
        ("no-reward", {"rewards": [{"function": "my_rewards.correct"}]}, "RewardImportFailed", "my_rewards"),
        ("no-model", {"model": {"path": "/models/nowhere"}}, "ModelNotFound", "/models/nowhere"),
    ],
)
def test_what_only_the_pod_can_know_fails_soon_and_once(
    cluster: Cluster, name: str, change: dict[str, Any], reason: str, words: str
) -> None:
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(changed(name, change)))
    failed = cluster.wait_for(name, "Failed", reason=reason, seconds=WAIT_SECONDS)
    assert words in failed["message"]
    [pod] = cluster.pods(name)
    took = _moment(failed["lastTransitionTime"]) - _moment(pod["status"]["startTime"])
    assert took.total_seconds() <= FAIL_SECONDS
    statuses = pod["status"]["initContainerStatuses"] + pod["status"]["containerStatuses"]
    assert [status["name"] for status in statuses if status["restartCount"] or "running" in status["state"]] == []
    assert pod["status"]["phase"] == "Failed", "a pod that has ended holds no GPUs"
    status = cluster.get("otj", name)["status"]
    assert (status["state"], status["message"], status["restarts"]) == ("Failed", failed["message"], 0)
    eventually("a warning that says why", lambda: reason in _warnings(cluster, name), seconds=30)


def _warnings(cluster: Cluster, name: str) -> list[str]:
    events = cluster.items("events", "--field-selector", f"involvedObject.kind=OnlineTrainingJob,involvedObject.name={name},type=Warning")
    return [event["reason"] for event in events]


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
