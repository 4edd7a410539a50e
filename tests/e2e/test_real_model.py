"""`grpo-addition.yaml` for a few steps: a real pretrained model on a volume that a user fills, and its answers in the log."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from tests.cluster.host import REPOSITORY, run
from tests.e2e.cluster import SAMPLES, Cluster, Object

pytestmark = pytest.mark.e2e

MODELS = REPOSITORY / "build" / "models"
NAME = "SmolLM2-135M-Instruct"
STEPS = 3
FETCH_SECONDS, COPY_SECONDS, RUN_SECONDS = 600.0, 300.0, 1500.0


@pytest.fixture(scope="module")
def model() -> Path:
    """The model's folder, made once with `otj model` as the sample says."""
    run(
        "otj",
        "model",
        "smollm2",
        MODELS / NAME,
        timeout_s=FETCH_SECONDS,
        env={"UV": shutil.which("uv") or str(REPOSITORY / "build/uv/bin/uv")},
    )
    return MODELS / NAME


@pytest.fixture(scope="module")
def volume(cluster: Cluster, model: Path) -> None:
    """The claim `models` of the sample, with the model in it."""
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}}
    for item in ({"kind": "PersistentVolumeClaim", "metadata": {"name": "models"}, "spec": claim}, _filler()):
        cluster.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", **item}))
    cluster.kubectl("wait", "--for=condition=Ready", "pod/filler", "--timeout=120s", seconds=130)
    cluster.kubectl("cp", str(model), "filler:/models/", seconds=COPY_SECONDS)
    cluster.kubectl("delete", "pod", "filler", "--grace-period=1", "--timeout=60s")


@pytest.fixture(scope="module")
def succeeded(cluster: Cluster, volume: None) -> Object:
    """The sample, made short: after its end."""
    job = yaml.safe_load((SAMPLES / "grpo-addition.yaml").read_text())
    job["spec"]["training"] |= {"max_steps": STEPS, "eval_prompts": 4}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(job))
    cluster.wait_for("grpo-addition", "Succeeded", seconds=RUN_SECONDS)
    return cluster.get("otj", "grpo-addition")


def test_a_real_model_from_a_mounted_volume_makes_its_steps(succeeded: Object) -> None:
    progress = succeeded["status"]["progress"]
    assert (progress["step"], progress["totalSteps"], progress["worldSize"]) == (STEPS, STEPS, 1)
    assert 0.0 <= float(progress["reward"]) <= 1.0
    assert succeeded["status"]["restarts"] == 0


def test_its_answers_can_be_read_with_kubectl_logs(cluster: Cluster, succeeded: Object) -> None:
    log = cluster.kubectl("logs", "-l", "onlinetraining.dev/job=grpo-addition", "-c", "trainer", "--tail=-1")
    for step in range(1, STEPS + 1):
        assert f"step {step}/{STEPS}" in log
    assert len(re.findall(r"What is \d+ \+ \d+\?.* -> '", log)) >= STEPS


def _filler() -> Object:
    """A pod that holds the volume open for `kubectl cp`."""
    harmless = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {
        "name": "filler",
        "image": "localhost/online-training-runtime:dev",
        "command": ["sleep", "600"],
        "volumeMounts": [{"name": "models", "mountPath": "/models"}],
        "securityContext": harmless,
    }
    owner = {"runAsNonRoot": True, "runAsUser": 65532, "fsGroup": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
    volumes = [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}]
    return {
        "kind": "Pod",
        "metadata": {"name": "filler"},
        "spec": {"securityContext": owner, "containers": [container], "volumes": volumes},
    }
