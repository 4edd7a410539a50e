"""The operator beside the real Job controller and garbage collector: what they do with our Job is what the status says.

Only the kubelet is played: a test writes how containers end, and Kubernetes decides what follows.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from otj_runtime.api import Reason
from otj_runtime.pod.errors import ExitCode, FailureNote
from tests.contract.apiserver import ApiServer
from tests.contract.kubelet import Kubelet, container
from tests.contract.operator_process import eventually
from tests.contract.runs import Run
from tests.unit.api.specs import changed

pytestmark = pytest.mark.integration

FULL = json.dumps({"status": {"hard": {"pods": "0"}, "used": {"pods": "0"}}})
"""What the quota controller, which does not run here, would write."""


@pytest.fixture
def kubelet(managed_server: ApiServer) -> Kubelet:
    return Kubelet(managed_server)


def running(
    server: ApiServer, kubelet: Kubelet, name: str, changes: dict[str, Any] | None = None, *, bound: bool = False
) -> tuple[Run, str]:
    """A run whose first pod runs, on a node if `bound`, and the name of that pod."""
    run = Run(server, name, changes)
    (pod,) = eventually("a pod", lambda: pods(server, name))
    if bound:
        kubelet.bind(pod)
    kubelet.run_pod(pod)
    run.wait("Running")
    return run, pod


def pods(server: ApiServer, name: str) -> list[str]:
    """Names of the pods of a job, as users find them."""
    found = server.kubectl("get", "pods", "-l", f"onlinetraining.dev/job={name}", "-o", "jsonpath={.items[*].metadata.name}")
    return found.split()


def test_a_run_succeeds_when_its_trainer_does(managed_server: ApiServer, kubelet: Kubelet) -> None:
    run, pod = running(managed_server, kubelet, "good")
    kubelet.end_trainer(pod, exit_code=0, reason="Completed")
    run.wait("Succeeded")
    assert run.object()["status"]["restarts"] == 0


def test_an_error_of_the_user_is_not_tried_again(managed_server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(managed_server, "user-error")
    (pod,) = eventually("a pod", lambda: pods(managed_server, "user-error"))
    kubelet.run_pod(pod)
    note = FailureNote(reason=Reason.DATASET_INVALID, message="sample 3 has no field prompt").to_json()
    kubelet.end_trainer(pod, exit_code=ExitCode.DATASET_INVALID, message=note)
    failed = run.wait("Failed", reason="DatasetInvalid")
    assert failed["message"] == "sample 3 has no field prompt"
    assert pods(managed_server, "user-error") == [pod]


def test_a_crash_is_tried_again_until_the_limit(managed_server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(managed_server, "crash", {"backoffLimit": 1})
    (first,) = eventually("a pod", lambda: pods(managed_server, "crash"))
    kubelet.run_pod(first)
    kubelet.end_trainer(first, exit_code=ExitCode.TRAINER_CRASHED)
    run.wait("Running", status="False", reason="Retrying")
    (second,) = eventually("another pod", lambda: set(pods(managed_server, "crash")) - {first})
    kubelet.run_pod(second)
    run.wait("Running")
    kubelet.end_trainer(second, exit_code=ExitCode.TRAINER_CRASHED)
    failed = run.wait("Failed", reason="TrainerCrashed")
    assert f"pod {second}, the last that backoffLimit allows" in failed["message"]
    assert run.object()["status"]["restarts"] == 1


def test_a_deadline_is_the_reason_and_not_what_followed_from_it(managed_server: ApiServer) -> None:
    run = Run(managed_server, "late", {"activeDeadlineSeconds": 2})
    run.wait("Failed", reason="DeadlineExceeded")
    assert pods(managed_server, "late") == []


def test_a_finished_job_that_is_removed_by_its_ttl_stays_succeeded(managed_server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(managed_server, "brief", {"ttlSecondsAfterFinished": 0})
    (pod,) = eventually("a pod", lambda: pods(managed_server, "brief"))
    kubelet.run_pod(pod)
    kubelet.end_trainer(pod, exit_code=0, reason="Completed")
    run.wait("Succeeded")
    eventually("the Job is gone", lambda: not managed_server.kubectl("get", "job", "brief", "--ignore-not-found"))
    assert run.object()["status"]["state"] == "Succeeded"


def test_a_run_that_was_made_suspended_runs_when_it_is_resumed(managed_server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(managed_server, "paused", {"suspend": True})
    run.wait("Suspended", reason="JobSuspended")
    assert pods(managed_server, "paused") == []
    run.change({"suspend": False})
    (pod,) = eventually("a pod", lambda: pods(managed_server, "paused"))
    kubelet.run_pod(pod)
    run.wait("Running")
    run.wait("Suspended", status="False", reason="NotSuspended")


def test_a_running_run_is_paused_and_goes_on(managed_server: ApiServer, kubelet: Kubelet) -> None:
    run, first = running(managed_server, kubelet, "pausing", bound=True)
    run.change({"suspend": True})
    held = run.wait("Suspended", status="False", reason="Suspending")
    assert "holds its accelerators" in held["message"]
    assert run.object()["status"]["state"] == "Suspending"
    assert "Running" not in managed_server.kubectl("get", "otj", "pausing")
    kubelet.end_trainer(first, exit_code=ExitCode.TERMINATED)
    managed_server.kubectl("delete", "pod", first, "--force", "--grace-period=0")
    run.wait("Suspended", reason="JobSuspended")
    assert run.object()["status"]["state"] == "Suspended"

    run.change({"suspend": False})
    (second,) = eventually("another pod", lambda: set(pods(managed_server, "pausing")) - {first})
    kubelet.run_pod(second)
    run.wait("Running")
    run.wait("Suspended", status="False", reason="NotSuspended")
    assert "Suspended" not in managed_server.kubectl("get", "otj", "pausing")
    status = run.object()["status"]
    assert (status["restarts"], status["restartsCounted"]) == (0, 0)


def test_a_pod_that_was_told_to_stop_is_replaced_and_not_counted(managed_server: ApiServer, kubelet: Kubelet) -> None:
    run, first = running(managed_server, kubelet, "drained", {"backoffLimit": 0})
    kubelet.end_trainer(first, exit_code=ExitCode.TERMINATED)
    (second,) = eventually("another pod", lambda: set(pods(managed_server, "drained")) - {first})
    kubelet.run_pod(second)
    run.wait("Running")
    status = run.object()["status"]
    assert (status["restarts"], status["restartsCounted"]) == (1, 0)


def test_a_pod_that_was_preempted_is_replaced_and_not_counted(managed_server: ApiServer, kubelet: Kubelet) -> None:
    """Killed before the trainer could say a word: Kubernetes' condition is all there is."""
    run, first = running(managed_server, kubelet, "preempted", {"backoffLimit": 0})
    disrupted = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler", "message": "for a more important pod"}
    kubelet.pod_status(first, conditions=[disrupted])
    kubelet.end_trainer(first, exit_code=137)
    eventually("another pod", lambda: set(pods(managed_server, "preempted")) - {first})
    assert run.condition("Failed") is None


def test_a_model_that_is_not_there_is_not_looked_for_again(managed_server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(managed_server, "no-model")
    (pod,) = eventually("a pod", lambda: pods(managed_server, "no-model"))
    ended = {"exitCode": ExitCode.MODEL_NOT_FOUND, "reason": "Error"}
    kubelet.pod_status(pod, phase="Failed", initContainerStatuses=[container("model", terminated=ended)])
    run.wait("Failed", reason="ModelNotFound")
    assert pods(managed_server, "no-model") == [pod]


def test_the_generators_exit_code_is_no_error_of_the_user(managed_server: ApiServer, kubelet: Kubelet) -> None:
    """vLLM's numbers are its own: the one that stands for a wrong dataset in the trainer says nothing here."""
    run, first = running(managed_server, kubelet, "sidecar")
    died = {"exitCode": ExitCode.DATASET_INVALID, "reason": "Error"}
    kubelet.pod_status(first, initContainerStatuses=[container("generator", terminated=died)])
    kubelet.end_trainer(first, exit_code=ExitCode.GENERATOR_LOST)
    eventually("another pod", lambda: set(pods(managed_server, "sidecar")) - {first})
    assert run.condition("Failed") is None


def test_a_run_that_somebody_scaled_to_no_pod_gets_one_again(managed_server: ApiServer) -> None:
    Run(managed_server, "scaled").created()
    managed_server.kubectl("patch", "job", "scaled", "--type=merge", "-p", json.dumps({"spec": {"parallelism": 0}}))
    parallelism = ("get", "job", "scaled", "-o", "jsonpath={.spec.parallelism}")
    eventually("one pod is wanted again", lambda: managed_server.kubectl(*parallelism) == "1")
    eventually("a pod", lambda: pods(managed_server, "scaled"))


def test_a_pod_that_somebody_deleted_is_replaced(managed_server: ApiServer, kubelet: Kubelet) -> None:
    run, first = running(managed_server, kubelet, "pod-deleted", bound=True)
    managed_server.kubectl("delete", "pod", first, "--wait=false")
    run.wait("Running", status="False", reason="Terminated")
    kubelet.end_trainer(first, exit_code=ExitCode.TERMINATED)
    (second,) = eventually("another pod", lambda: set(pods(managed_server, "pod-deleted")) - {first})
    eventually("the status names it", lambda: run.object()["status"].get("podName") == second)


def test_a_pod_that_lost_its_labels_is_followed_again_once_the_told_command_has_put_them_back(
    managed_server: ApiServer, kubelet: Kubelet
) -> None:
    """The Job controller knows its pod by another label, so it goes on, and nothing else would be made in its place."""
    run, pod = running(managed_server, kubelet, "bare-pod")
    managed_server.kubectl("label", "pod", pod, "onlinetraining.dev/job-")
    run.wait("Running", status="False", reason="PodPending")
    command = eventually("the cure is told", lambda: re.search("`kubectl (.+)`", (run.condition("Running") or {})["message"]))
    managed_server.kubectl(*command[1].split())
    run.wait("Running")
    assert pods(managed_server, "bare-pod") == [pod]


def test_a_run_that_makes_no_headway_is_ended_before_its_limit(managed_server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(managed_server, "stuck", {"backoffLimit": 50})
    (pod,) = eventually("a pod", lambda: pods(managed_server, "stuck"))
    kubelet.run_pod(pod)
    note = FailureNote(reason=Reason.NO_NEW_CHECKPOINT, message="failed 3 times at step 57").to_json()
    kubelet.end_trainer(pod, exit_code=ExitCode.NO_NEW_CHECKPOINT, message=note)
    run.wait("Failed", reason="NoNewCheckpoint")


def test_limits_may_change_while_the_run_goes(managed_server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(managed_server, "longer", {"activeDeadlineSeconds": 600})
    eventually("a pod", lambda: pods(managed_server, "longer"))
    run.change({"activeDeadlineSeconds": None, "backoffLimit": 7, "ttlSecondsAfterFinished": 60})

    def limits() -> bool:
        spec = kubelet.get("job", "longer")["spec"]
        found = (spec.get("activeDeadlineSeconds"), spec["backoffLimit"], spec.get("ttlSecondsAfterFinished"))
        return found == (None, 7, 60)

    eventually("the Job has them", limits)
    assert len(pods(managed_server, "longer")) == 1


def test_what_only_events_tell_is_the_explanation(managed_server: ApiServer) -> None:
    """The namespace has a quota of no pods, so the Job controller cannot make one, and tells nobody but the Events."""
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none", "namespace": "full"},
        "spec": {"hard": {"pods": "0"}},
    }
    managed_server.kubectl("create", "namespace", "full")
    managed_server.kubectl("create", "-f", "-", stdin=json.dumps(quota))
    managed_server.kubectl("patch", "resourcequota", "none", "-n", "full", "--subresource=status", "--type=merge", "-p", FULL)
    document = changed({}, name="refused")
    document["metadata"]["namespace"] = "full"
    managed_server.kubectl("create", "-f", "-", stdin=json.dumps(document))

    def explained() -> bool:
        found = json.loads(managed_server.kubectl("get", "otj", "refused", "-n", "full", "-o", "json"))
        said = {c["type"]: c for c in found.get("status", {}).get("conditions", [])}.get("Progressing", {})
        return said.get("reason") == "PodRefused" and "exceeded quota: none" in said["message"]

    eventually("the quota is named", explained)


@pytest.mark.parametrize("cascade", ["background", "foreground"])
def test_deleting_a_run_leaves_nothing_behind(managed_server: ApiServer, cascade: str) -> None:
    name = f"gone-{cascade}"
    run = Run(managed_server, name)
    eventually("a pod", lambda: pods(managed_server, name))
    run.wait("Running", status="False")
    managed_server.kubectl("delete", "otj", name, f"--cascade={cascade}")
    left = ("get", "otj,jobs,pods,configmaps,secrets,services,pvc", "-l", f"onlinetraining.dev/job={name}", "-o", "name")
    eventually("everything is gone", lambda: not managed_server.kubectl(*left))


def test_a_job_that_was_orphaned_runs_on_and_is_nobody_elses(managed_server: ApiServer) -> None:
    Run(managed_server, "orphan").created()
    managed_server.kubectl("delete", "otj", "orphan", "--cascade=orphan")
    eventually("no owner", lambda: not managed_server.kubectl("get", "job", "orphan", "-o", "jsonpath={.metadata.ownerReferences}"))
    failed = Run(managed_server, "orphan").wait("Failed", reason="JobConflict")
    assert "belongs to nobody" in failed["message"]
    assert managed_server.kubectl("get", "job", "orphan", "-o", "jsonpath={.metadata.deletionTimestamp}") == ""


def test_a_run_can_be_deleted_and_applied_again_at_once(managed_server: ApiServer) -> None:
    first = Run(managed_server, "again").created()
    managed_server.kubectl("delete", "otj", "again")
    second = Run(managed_server, "again")
    second.wait("Created")
    job = eventually(
        "the new Job", lambda: managed_server.kubectl("get", "job", "again", "-o", "jsonpath={.metadata.uid}", "--ignore-not-found")
    )
    assert job != first["metadata"]["uid"]
