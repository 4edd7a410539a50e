"""The CRD on a real API server: what it takes, what it refuses, and with which words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from otj_runtime.api.lifecycle import CHANGEABLE, FIXED
from otj_runtime.pod.names import QUEUE_LABEL
from tests.cluster.host import REPOSITORY, ClusterError
from tests.contract.apiserver import ApiServer
from tests.unit.api.specs import (
    HARMLESS_WORDS,
    INVALID,
    NO_SECRET_ARGUMENTS,
    NO_SECRETS,
    REFUSED_BY_THE_SERVER,
    SCRIPT,
    VALID,
    Invalid,
    changed,
)

pytestmark = pytest.mark.integration

SAMPLES = sorted((REPOSITORY / "manifests" / "samples").glob("*.yaml"))


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_a_sample_is_accepted(server: ApiServer, path: Path) -> None:
    assert "created (server dry run)" in server.kubectl("apply", "--dry-run=server", "-f", str(path))


@pytest.mark.parametrize("case", [*INVALID, *REFUSED_BY_THE_SERVER], ids=lambda case: case.name)
def test_an_invalid_spec_is_refused_at_apply_with_the_fix(server: ApiServer, case: Invalid) -> None:
    with pytest.raises(ClusterError) as refused:
        server.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(case.document()))
    said = str(refused.value)
    assert case.message in said
    assert "evaluating rule" not in said, "a rule must not fail of what another one refuses"


def test_a_name_that_no_label_can_hold_is_refused(server: ApiServer) -> None:
    with pytest.raises(ClusterError, match=r"metadata\.name: needs at most 63 characters"):
        server.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(changed({}, name="a" * 64)))


def test_a_variable_may_be_set_only_once(server: ApiServer) -> None:
    twice = [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]
    with pytest.raises(ClusterError, match=r"spec\.env\[1\]: Duplicate value"):
        server.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(changed({"env": twice})))


@pytest.mark.parametrize(
    "changes",
    [
        {"env": [{"name": name, "value": value} for name, value in NO_SECRETS.items()]},
        {"dataset": None, "trainer.command": [*SCRIPT, *HARMLESS_WORDS]},
        {"rewards": [{"function": "a.b", "args": NO_SECRET_ARGUMENTS}], "dataset.args": NO_SECRET_ARGUMENTS},
    ],
    ids=["variables", "words of a command", "arguments of functions"],
)
def test_what_is_only_called_like_a_secret_passes(server: ApiServer, changes: dict[str, Any]) -> None:
    server.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(changed(changes)))


CHANGES: dict[str, Any] = {
    "algorithm": "OnlineDPO",
    "model": {"name": "builtin/other"},
    "dataset": {"args": {"length": 9}},
    "rewards": [{"function": "mine.rewards.score"}],
    "gpus": 8,
    "generation": {"enablePrefixCaching": False},
    "rollout": {"staleness": 1},
    "lora": {},
    "training": {"learning_rate": 0.1},
    "accelerate": {"config": {"a": 1}},
    "image": "another",
    "imagePullPolicy": "Always",
    "resources": {"trainer": {"limits": {"memory": "1Gi"}}},
    "env": [{"name": "A", "value": "2"}],
    "volumes": [{"name": "v", "emptyDir": {"medium": "Memory"}}],
    "volumeMounts": [{"name": "v", "mountPath": "/w"}],
    "nodeSelector": {"a": "b"},
    "tolerations": [{"operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
    "serviceAccountName": "other",
    "output": {"saveSteps": 7},
    "accelerator": {"device": "cpu"},
    "managedBy": "example.com/other",
}
"""A change of each field that cannot change."""


def test_what_cannot_change_is_refused_with_the_reason_and_what_to_do(server: ApiServer) -> None:
    pieces = {"env": [{"name": "A", "value": "1"}], "volumes": [{"name": "v", "emptyDir": {}}]}
    server.kubectl("create", "-f", "-", stdin=json.dumps(changed(pieces, name="fixed")))
    for name, value in CHANGES.items():
        words = f"{name}: cannot change once the run exists, because {FIXED[name]}; delete it and apply it again"
        with pytest.raises(ClusterError, match=re.escape(words)):
            server.kubectl("patch", "otj", "fixed", "--type=merge", "-p", json.dumps({"spec": {name: value}}))
    server.kubectl("delete", "otj", "fixed")
    assert FIXED.keys() - CHANGES.keys() == {"nodes", "trainer"}, "nodes has one value, and trainer excludes dataset"


def test_the_script_of_a_run_cannot_change(server: ApiServer) -> None:
    server.kubectl("create", "-f", "-", stdin=json.dumps(changed({"dataset": None, "trainer.command": SCRIPT}, name="scripted")))
    another = json.dumps({"spec": {"trainer": {"command": [*SCRIPT, "--more"]}}})
    with pytest.raises(ClusterError, match=re.escape(f"trainer: cannot change once the run exists, because {FIXED['trainer']}")):
        server.kubectl("patch", "otj", "scripted", "--type=merge", "-p", another)
    server.kubectl("delete", "otj", "scripted")


@pytest.mark.parametrize("name", CHANGEABLE)
def test_what_may_change_may_be_set_changed_and_removed(server: ApiServer, name: str) -> None:
    server.kubectl("create", "-f", "-", stdin=json.dumps(changed({}, name="loose")))
    for value in [True, None] if name == "suspend" else [5, 7, None]:
        server.kubectl("patch", "otj", "loose", "--type=merge", "-p", json.dumps({"spec": {name: value}}))
    server.kubectl("label", "otj", "loose", "team=a")
    server.kubectl("delete", "otj", "loose")


def test_a_queue_cannot_change_once_the_job_is_in_it(server: ApiServer) -> None:
    document = changed({}, name="queued-once")
    document["metadata"]["labels"] = {QUEUE_LABEL: "a"}
    server.kubectl("create", "-f", "-", stdin=json.dumps(document))
    server.kubectl("label", "otj", "queued-once", f"{QUEUE_LABEL}=b", "--overwrite")
    status = json.dumps({"status": {"jobUid": "1"}})
    server.kubectl("patch", "otj", "queued-once", "--subresource=status", "--type=merge", "-p", status)
    with pytest.raises(ClusterError, match=r'queue-name\]: cannot change from "b" to "c", because the Job was queued with the first'):
        server.kubectl("label", "otj", "queued-once", f"{QUEUE_LABEL}=c", "--overwrite")
    server.kubectl("delete", "otj", "queued-once")


def test_the_api_server_fills_in_the_defaults_that_users_see(server: ApiServer) -> None:
    stored = json.loads(server.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=json.dumps(VALID)))["spec"]
    assert stored["generation"] == {
        "gpus": 1,
        "gpuMemoryUtilization": 0.9,
        "weightTransfer": "auto",
        "enablePrefixCaching": True,
        "readyTimeoutSeconds": 900,
    }
    assert stored["accelerator"] == {"device": "cuda"}
    assert (stored["backoffLimit"], stored["suspend"], stored["nodes"]) == (3, False, 1)


def test_pieces_of_a_pod_pass_through_unchanged(server: ApiServer) -> None:
    env = [{"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token", "optional": True}}}]
    volumes = [{"name": "data", "nfs": {"server": "s", "path": "/p", "aNewerField": 1}}]
    spec = changed({"env": env, "volumes": volumes})
    stored = json.loads(server.kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", stdin=json.dumps(spec)))["spec"]
    assert (stored["env"], stored["volumes"]) == (env, volumes)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("otj.spec.gpus", "Accelerators of the job, at least 2"),
        ("otj.spec.training.num_generations", "Completions sampled for each prompt"),
        ("otj.spec.training.output_dir", "set spec.output.path instead"),
        ("otj.status.progress.reward", "Mean reward of the last step"),
    ],
)
def test_kubectl_explains_a_field(server: ApiServer, field: str, words: str) -> None:
    assert words in " ".join(server.kubectl("explain", field).split())
