"""Under Kueue: who may do what to the Job, and whether the status says what Kueue decided."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from otj_runtime.pod.names import QUEUE_LABEL
from tests.contract.apiserver import ApiServer
from tests.contract.kubelet import Kubelet
from tests.contract.kueue import FLAVOUR, Kueue, kueue
from tests.contract.operator_process import eventually, running_operator
from tests.contract.runs import Run

pytestmark = pytest.mark.integration

Object = dict[str, Any]

QUEUE = {QUEUE_LABEL: "team-a"}


@pytest.fixture(scope="module")
def queues(server: ApiServer) -> Iterator[Kueue]:
    """Kueue, and the operator beside it."""
    with kueue(server) as installed, running_operator(server, name="under-kueue"):
        yield installed


def queued(queues: Kueue, name: str, changes: Object | None = None, **metadata: Object) -> Run:
    """A run in the queue, whose Workload is there."""
    run = Run(queues.server, name, changes, labels=QUEUE | metadata.pop("labels", {}), **metadata)
    run.wait("Suspended", reason="WaitingForQueue")
    eventually("a Workload", lambda: queues.server.kubectl("get", "workload", f"job-{name}", "--ignore-not-found"))
    return run


def started(queues: Kueue, kubelet: Kubelet, name: str) -> Run:
    """A run that Kueue has admitted and that trains."""
    run = queued(queues, name)
    queues.admit(name)
    eventually("Kueue starts the Job", lambda: kubelet.get("job", name)["spec"]["suspend"] is False)
    kubelet.start_pod(name, name=f"{name}-1")
    run.wait("Running")
    return run


def end_pod(kubelet: Kubelet, job: str, pod: str) -> None:
    """What follows from a suspended Job: its pod goes."""
    eventually("the Job is suspended", lambda: kubelet.get("job", job)["spec"]["suspend"])
    kubelet.server.kubectl("delete", "pod", pod, "--force", "--grace-period=0")


def writers_of_suspend(kubelet: Kubelet, job: str) -> set[str]:
    """Whose word Job.spec.suspend is."""
    found = json.loads(kubelet.server.kubectl("get", "job", job, "-o", "json", "--show-managed-fields"))
    return {entry["manager"] for entry in found["metadata"]["managedFields"] if "f:suspend" in entry["fieldsV1"].get("f:spec", {})}


def test_what_kueue_reads_is_copied_and_waiting_is_explained(queues: Kueue, kubelet: Kubelet) -> None:
    labels = {"kueue.x-k8s.io/priority-class": "high", "kueue.x-k8s.io/max-exec-time-seconds": "60"}
    topology = {"kueue.x-k8s.io/podset-required-topology": "rack", "another": "one"}
    run = queued(queues, "copied", labels=labels, annotations=topology)
    job = kubelet.get("job", "copied")
    assert (QUEUE | labels).items() <= job["metadata"]["labels"].items()
    template = job["spec"]["template"]["metadata"]
    assert QUEUE_LABEL not in template["labels"], "Kueue would manage the pod as well"
    assert template["annotations"].get("kueue.x-k8s.io/podset-required-topology") == "rack"
    assert "another" not in template["annotations"]
    queues.deny("copied", "WaitingForQuota", "couldn't assign flavors: 8 nvidia.com/gpu are missing")
    quota = run.wait("QuotaReserved", status="False", reason="WaitingForQuota")
    eventually("the sentence", lambda: quota["message"] in run.object()["status"]["message"])
    assert run.object()["status"]["state"] == "Queued"


def test_kueue_starts_evicts_and_starts_again_and_nobody_fights(queues: Kueue, kubelet: Kubelet) -> None:
    run = started(queues, kubelet, "evicted")
    assert kubelet.get("job", "evicted")["spec"]["template"]["spec"]["nodeSelector"] == FLAVOUR
    assert run.condition("QuotaReserved")["status"] == "True"  # type: ignore[index]
    queues.evict("evicted", "Preempted", "for workload urgent")
    end_pod(kubelet, "evicted", "evicted-1")
    waits = run.wait("Suspended", reason="WaitingForQueue")
    eventually("the reason", lambda: "(Preempted): for workload urgent" in (run.condition("Suspended") or waits)["message"])
    assert not kubelet.get("job", "evicted")["spec"]["template"]["spec"].get("nodeSelector")
    queues.admit("evicted")
    run.wait("Suspended", status="False", reason="NotSuspended")
    kubelet.start_pod("evicted", name="evicted-2")
    run.wait("Running")
    assert writers_of_suspend(kubelet, "evicted") == {"kueue"}


def test_a_pause_goes_through_the_workload(queues: Kueue, kubelet: Kubelet) -> None:
    run = started(queues, kubelet, "paused-in-queue")
    run.change({"suspend": True})
    run.wait("Suspended", status="False", reason="Suspending")
    eventually("the Workload is not active", lambda: not queues.workload("paused-in-queue")["spec"]["active"])
    end_pod(kubelet, "paused-in-queue", "paused-in-queue-1")
    run.wait("Suspended", reason="JobSuspended")
    run.change({"suspend": False})
    eventually("the Workload is active", lambda: queues.workload("paused-in-queue")["spec"]["active"])
    run.wait("Suspended", reason="WaitingForQueue")
    queues.admit("paused-in-queue")
    run.wait("Suspended", status="False", reason="NotSuspended")
    assert writers_of_suspend(kubelet, "paused-in-queue") == {"kueue"}


def test_a_run_that_is_made_paused_is_queued_when_it_is_resumed(queues: Kueue) -> None:
    run = Run(queues.server, "later", {"suspend": True}, labels=QUEUE)
    run.wait("Suspended", reason="JobSuspended")
    assert queues.server.kubectl("get", "job", "later", "--ignore-not-found") == ""
    run.change({"suspend": False})
    run.wait("Suspended", reason="WaitingForQueue")


def test_a_workload_that_kueue_gave_up_stays_so_and_says_how_to_go_on(queues: Kueue, kubelet: Kubelet) -> None:
    run = started(queues, kubelet, "too-long")
    queues.deactivate("too-long", "MaximumExecutionTimeExceeded", "exceeded 60 s")
    end_pod(kubelet, "too-long", "too-long-1")
    given_up = run.wait("Suspended", reason="QueueDeactivated")
    assert "MaximumExecutionTimeExceeded: exceeded 60 s" in given_up["message"]
    assert "kubectl patch workload job-too-long --type=merge" in given_up["message"]
    assert queues.workload("too-long")["spec"]["active"] is False
