"""The operator against a real API server, under the rights of install.yaml: from a job to its end, and every way to fail."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from otj_runtime.api import Reason
from otj_runtime.pod.errors import ExitCode, FailureNote
from tests.contract.apiserver import ApiServer
from tests.contract.kubelet import Kubelet
from tests.contract.launcher import Launcher, launcher
from tests.contract.operator_process import eventually
from tests.contract.runs import Run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("operator")]


@pytest.fixture
def progress_port() -> Iterator[Launcher]:
    with launcher() as started:
        yield started


def test_a_job_goes_from_apply_to_succeeded(server: ApiServer, kubelet: Kubelet, progress_port: Launcher) -> None:
    run = Run(server, "healthy")
    run.created()
    run.wait("Running", status="False", reason="PodPending")
    kubelet.start_pod("healthy", name="healthy-1", launcher=progress_port.address, ready=False)
    run.wait("Running", reason="Starting")
    run.wait("GeneratorReady", status="False", reason="GeneratorStarting")
    kubelet.start_pod_generator("healthy-1")
    run.wait("GeneratorReady", reason="GeneratorServing")
    progress_port.tell(12, 150, "0.25")
    run.wait("Running", reason="Training")
    eventually("step 12 is shown", lambda: "12/150" in server.kubectl("get", "otj", "healthy"))
    row = server.kubectl("get", "otj", "healthy", "--no-headers").split()
    assert row[:-1] == ["healthy", "GRPO", "4", "Running", "12/150", "0.25"]

    kubelet.end_trainer("healthy-1", exit_code=0, reason="Completed")
    kubelet.end_job("healthy", "Complete", reason="CompletionsReached")
    server.kubectl("wait", "--for=condition=Succeeded", "otj/healthy", "--timeout=20s")
    status = run.object()["status"]
    assert (status["state"], status["progress"]["steps"], status["progress"]["reward"]) == ("Succeeded", "150/150", "0.25")
    assert {c["observedGeneration"] for c in status["conditions"]} == {1}
    eventually("the end is an event", lambda: ("Normal", "Finished") in run.events())
    assert [reason for _, reason in run.events()].count("JobCreated") == 1


def test_the_launchers_words_are_the_failure_that_users_see(server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(server, "bad-reward")
    run.created()
    kubelet.start_pod("bad-reward", name="bad-reward-1")
    note = FailureNote(reason=Reason.REWARD_IMPORT_FAILED, message="rewards[0].function: no module named 'mine'").to_json()
    kubelet.end_trainer("bad-reward-1", exit_code=ExitCode.REWARD_IMPORT_FAILED, message=note)
    kubelet.end_job("bad-reward", "Failed", reason="PodFailurePolicy", message="Container trainer failed with exit code 67")
    failed = run.wait("Failed", reason="RewardImportFailed")
    assert failed["message"] == "rewards[0].function: no module named 'mine'"
    assert run.object()["status"]["state"] == "Failed"
    eventually("a warning", lambda: ("Warning", "RewardImportFailed") in run.events())


def test_a_pod_that_no_node_takes_is_explained(server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(server, "unschedulable")
    run.created()
    kubelet.make_pod("unschedulable", name="unschedulable-1")
    message = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    kubelet.pod_status("unschedulable-1", phase="Pending", conditions=[scheduled])
    kubelet.job_status("unschedulable", active=1)
    eventually("the scheduler's words", lambda: message in (run.condition("Running") or {}).get("message", ""))
    assert message in server.kubectl("get", "otj", "unschedulable", "-o", "wide")


def test_a_foreign_job_of_the_same_name_is_left_alone(server: ApiServer, kubelet: Kubelet) -> None:
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x"}]}}
    foreign = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "taken"}, "spec": {"template": template}}
    server.kubectl("create", "-f", "-", stdin=json.dumps(foreign))
    before = kubelet.get("job", "taken")
    run = Run(server, "taken")
    failed = run.wait("Failed", reason="JobConflict")
    assert "default/taken exists and belongs to nobody" in failed["message"]
    assert kubelet.get("job", "taken") == before


def test_a_job_that_the_api_server_refuses_fails_with_its_words(server: ApiServer) -> None:
    run = Run(server, "rejected", {"volumes": [{"name": "output", "emptyDir": {}}]})
    failed = run.wait("Failed", reason="JobRejected")
    assert 'Duplicate value: "output"' in failed["message"]


def test_a_job_deleted_by_hand_is_not_run_again(server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(server, "lost")
    run.created()
    server.kubectl("delete", "job", "lost", "--cascade=background")
    failed = run.wait("Failed", reason="JobLost")
    assert "was deleted while the run was going" in failed["message"]
    assert server.kubectl("get", "job", "lost", "--ignore-not-found") == ""


def test_a_job_that_is_removed_the_moment_it_ends_has_still_succeeded(server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(server, "brief", {"ttlSecondsAfterFinished": 0})
    run.created()
    kubelet.end_job("brief", "Complete", reason="CompletionsReached")
    server.kubectl("delete", "job", "brief")
    run.wait("Succeeded")


def test_what_somebody_takes_from_our_job_is_put_back(server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(server, "plundered")
    owner = run.created()["metadata"]["ownerReferences"]
    bare = {"labels": {"app.kubernetes.io/managed-by": None, "team": "a"}, "ownerReferences": None}
    server.kubectl("patch", "job", "plundered", "--type=merge", "-p", json.dumps({"metadata": bare}))

    def back() -> bool:
        metadata = kubelet.get("job", "plundered")["metadata"]
        return metadata.get("ownerReferences") == owner and metadata["labels"].get("app.kubernetes.io/managed-by") is not None

    eventually("label and owner are back", back)
    assert kubelet.get("job", "plundered")["metadata"]["labels"]["team"] == "a"
    assert run.condition("Failed") is None


def test_a_job_that_had_lost_its_labels_is_followed_to_its_end(server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(server, "bare-job")
    run.created()
    managed = "jsonpath={.metadata.labels.app\\.kubernetes\\.io/managed-by}"
    before = server.kubectl("get", "job", "bare-job", "-o", managed)
    server.kubectl("label", "job", "bare-job", "app.kubernetes.io/managed-by-")
    eventually("the label is back", lambda: server.kubectl("get", "job", "bare-job", "-o", managed) == before)
    kubelet.end_job("bare-job", "Complete", reason="CompletionsReached")
    run.wait("Succeeded")


def test_a_job_that_somebody_else_suspended_is_left_so_and_says_it(server: ApiServer, kubelet: Kubelet) -> None:
    run = Run(server, "held")
    run.created()
    server.kubectl("patch", "job", "held", "--type=merge", "-p", json.dumps({"spec": {"suspend": True}}))
    run.wait("Suspended", reason="SuspendedElsewhere")
    assert kubelet.get("job", "held")["spec"]["suspend"] is True


def test_what_another_controller_manages_is_not_touched(server: ApiServer) -> None:
    run = Run(server, "theirs", {"managedBy": "kueue.x-k8s.io/multikueue"})
    Run(server, "ours-after-theirs").created()
    assert "status" not in run.object()
    assert server.kubectl("get", "job", "theirs", "--ignore-not-found") == ""


def test_a_suspended_job_is_created_suspended_and_says_so(server: ApiServer) -> None:
    run = Run(server, "paused", {"suspend": True})
    assert run.created()["spec"]["suspend"] is True
    run.wait("Suspended", reason="JobSuspended")
    assert run.object()["status"]["state"] == "Suspended"


def test_the_job_belongs_to_its_owner_so_that_deleting_leaves_nothing(server: ApiServer) -> None:
    run = Run(server, "owned")
    (owner,) = run.created()["metadata"]["ownerReferences"]
    parent = run.object()
    assert owner == {
        "apiVersion": parent["apiVersion"],
        "kind": parent["kind"],
        "name": "owned",
        "uid": parent["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    assert not parent["metadata"].get("finalizers")
    assert "kopf" not in json.dumps(parent), "the operator leaves no marks on users' objects"
    server.kubectl("delete", "otj", "owned", "--timeout=10s")
    assert server.kubectl("get", "otj", "owned", "--ignore-not-found") == ""


def test_a_job_of_an_earlier_run_of_the_same_name_is_waited_for(server: ApiServer) -> None:
    Run(server, "again").created()
    server.kubectl("delete", "otj", "again")
    run = Run(server, "again")
    waiting = run.wait("Created", status="False", reason="JobConflict")
    assert "Waiting until the Job default/again of an earlier run is gone" in waiting["message"]
    server.kubectl("delete", "job", "again")  # no garbage collector runs here
    run.created()


def test_the_pods_of_a_job_are_allowed_where_the_restricted_standard_is_enforced(server: ApiServer) -> None:
    server.kubectl("create", "namespace", "strict")
    server.kubectl("label", "namespace", "strict", "pod-security.kubernetes.io/enforce=restricted")
    template = Run(server, "harmless").created()["spec"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "harmless", "namespace": "strict"}, "spec": template["spec"]}
    server.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))


def test_the_operators_own_pod_is_allowed_in_its_namespace(server: ApiServer) -> None:
    path = ("deployment", "online-training-operator", "-n", "online-training-system", "-o", "json")
    spec = json.loads(server.kubectl("get", *path))["spec"]["template"]["spec"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "try", "namespace": "online-training-system"}, "spec": spec}
    server.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(pod))
