"""A run that is suspended far from any periodic checkpoint, and resumed, with its output on a claim: no step is lost or made twice."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
import yaml

from tests.e2e.cluster import SAMPLES, Cluster, Object, eventually

pytestmark = pytest.mark.e2e

JOB = "grpo-copy"
STEPS, SOME_STEPS = 120, 3
START_SECONDS, SUSPEND_SECONDS, TRAIN_SECONDS = 300.0, 120.0, 600.0


@dataclass(frozen=True)
class Pause:
    """What the run showed before, in and after its pause."""

    before: list[int]
    """Steps in the first trainer's log, in its order."""
    suspended: Object
    pods_left: list[Object]
    """Pods that were there at that moment: the object of one that has ended goes a little later."""
    checkpoint: int
    """What the status gave as the newest checkpoint while the second pod ran."""
    after: list[int]
    """Steps in the second trainer's log."""
    ended: Object


@pytest.fixture(scope="module")
def pause(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Pause:
    """The sample on two GPUs, suspended after some steps and resumed."""
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(_claim()))
    job = yaml.safe_load((SAMPLES / "grpo-copy.yaml").read_text())
    job["spec"] |= {"gpus": 2, "output": {"claimName": "runs", "saveSteps": 1000}}
    job["spec"]["training"]["max_steps"] = STEPS
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(job))
    eventually(f"{SOME_STEPS} steps are made", lambda: _progress(cluster).get("step", 0) >= SOME_STEPS, seconds=START_SECONDS)
    first_log = tmp_path_factory.mktemp("suspend") / "first.log"
    follower = cluster.background(f"kubectl logs --follow {_pod(cluster)} -c trainer", first_log)  # it goes with its pod

    _suspend(cluster, True)
    cluster.wait_for(JOB, "Suspended", reason="JobSuspended", seconds=SUSPEND_SECONDS)
    suspended, pods_left = cluster.get("otj", JOB), cluster.pods(JOB)
    follower.wait(timeout=30)
    eventually("no pod is left", lambda: not cluster.pods(JOB), seconds=30)

    _suspend(cluster, False)
    cluster.wait_for(JOB, "Running", reason="Training", seconds=START_SECONDS)
    checkpoint = eventually("the checkpoint is told", lambda: _progress(cluster).get("checkpointStep"), seconds=60)
    cluster.wait_for(JOB, "Succeeded", seconds=TRAIN_SECONDS)
    second_log = cluster.kubectl("logs", _pod(cluster), "-c", "trainer")
    return Pause(_steps(first_log.read_text()), suspended, pods_left, int(checkpoint), _steps(second_log), cluster.get("otj", JOB))


def test_while_it_is_suspended_no_pod_holds_its_gpus_and_it_says_so(pause: Pause) -> None:
    assert [pod["status"]["phase"] for pod in pause.pods_left if pod["status"]["phase"] not in ("Succeeded", "Failed")] == []
    assert pause.suspended["status"]["state"] == "Suspended"
    assert _condition(pause.suspended, "Running") == ("False", "JobSuspended")


def test_while_it_is_suspended_its_status_holds_the_last_step_and_its_checkpoint(pause: Pause) -> None:
    progress = pause.suspended["status"]["progress"]
    assert (progress["step"], progress["checkpointStep"]) == (pause.before[-1], pause.before[-1])
    assert _condition(pause.suspended, "CheckpointFresh") == ("True", "CheckpointSaved")


def test_the_checkpoint_of_the_pause_is_of_the_last_step_that_was_made(pause: Pause) -> None:
    assert pause.before[-1] >= SOME_STEPS
    assert pause.checkpoint == pause.before[-1]


def test_each_step_is_made_once_in_one_of_the_two_pods(pause: Pause) -> None:
    assert pause.after[0] == pause.checkpoint + 1
    assert pause.before + pause.after == list(range(1, STEPS + 1))


def test_a_pause_is_no_restart_and_the_run_succeeds(pause: Pause) -> None:
    status = pause.ended["status"]
    assert status["progress"]["steps"] == f"{STEPS}/{STEPS}"
    assert (status["restarts"], status["restartsCounted"]) == (0, 0)


def _claim() -> Object:
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "runs"}, "spec": spec}


def _suspend(cluster: Cluster, suspend: bool) -> None:
    cluster.kubectl("patch", "otj", JOB, "--type=merge", "-p", json.dumps({"spec": {"suspend": suspend}}))


def _progress(cluster: Cluster) -> Object:
    found: Object = cluster.get("otj", JOB).get("status", {}).get("progress", {})
    return found


def _condition(job: Object, kind: str) -> tuple[str, str]:
    [found] = [condition for condition in job["status"]["conditions"] if condition["type"] == kind]
    return found["status"], found["reason"]


def _pod(cluster: Cluster) -> str:
    [pod] = cluster.pods(JOB)
    return str(pod["metadata"]["name"])


def _steps(log: str) -> list[int]:
    return [int(step) for step in re.findall(rf"^step (\d+)/{STEPS}\b", log, flags=re.MULTILINE)]
