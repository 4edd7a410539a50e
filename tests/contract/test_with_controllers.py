"""The operator beside the real Job controller and garbage collector: what they do with our Job is what the status says.

Only the kubelet is played: a test writes how containers end, and Kubernetes decides what follows.
"""

from __future__ import annotations

import pytest

from otj_runtime.api import Reason
from otj_runtime.pod.errors import ExitCode, FailureNote
from tests.contract.apiserver import ApiServer
from tests.contract.kubelet import Kubelet
from tests.contract.operator_process import eventually
from tests.contract.runs import Run

pytestmark = pytest.mark.integration


@pytest.fixture
def kubelet(managed_server: ApiServer) -> Kubelet:
    return Kubelet(managed_server)


def pods(server: ApiServer, name: str) -> list[str]:
    """Names of the pods of a job, as users find them."""
    found = server.kubectl("get", "pods", "-l", f"onlinetraining.dev/job={name}", "-o", "jsonpath={.items[*].metadata.name}")
    return found.split()


def test_a_run_succeeds_when_its_trainer_does(managed_server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(managed_server, "good")
    (pod,) = eventually("a pod", lambda: pods(managed_server, "good"))
    kubelet.run_pod(pod)
    run.wait("Running")
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


def test_deleting_a_run_leaves_nothing_behind(managed_server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(managed_server, "gone")
    eventually("a pod", lambda: pods(managed_server, "gone"))
    run.wait("Running", status="False")
    managed_server.kubectl("delete", "otj", "gone")
    left = ("get", "otj,jobs,pods,configmaps,secrets,services,pvc", "-l", "onlinetraining.dev/job=gone", "-o", "name")
    eventually("everything is gone", lambda: not managed_server.kubectl(*left))


def test_a_run_can_be_deleted_and_applied_again_at_once(managed_server: ApiServer) -> None:
    first = Run(managed_server, "again").created()
    managed_server.kubectl("delete", "otj", "again")
    second = Run(managed_server, "again")
    second.wait("Created")
    job = eventually(
        "the new Job", lambda: managed_server.kubectl("get", "job", "again", "-o", "jsonpath={.metadata.uid}", "--ignore-not-found")
    )
    assert job != first["metadata"]["uid"]
