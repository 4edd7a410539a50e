"""README's lines with `grpo-copy.yaml`: one run on three training ranks and one generator, from apply to nothing left.

The tests stand in the order of the run's life; each looks at what the API server knows at that moment.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.cluster import OPERATOR, SYSTEM, Cluster, Object, eventually, operator_pod

pytestmark = pytest.mark.e2e

JOB = "grpo-copy"
START_SECONDS, TRAIN_SECONDS, DELETE_SECONDS = 600.0, 1500.0, 240.0
GPU = "nvidia.com/gpu"
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)
    print("connected")
except OSError as error:
    print(type(error).__name__)
"""
ACCOUNT = f"system:serviceaccount:{SYSTEM}:{OPERATOR}"


@dataclass(frozen=True)
class Run:
    """The run of this module."""

    cluster: Cluster
    before: set[str]
    """What the namespace held before it."""
    watched: Path
    """Output of README's `kubectl get otj -w`."""

    @property
    def object(self) -> Object:
        return self.cluster.get("otj", JOB)

    @property
    def pod(self) -> Object:
        [pod] = self.cluster.pods(JOB)
        return pod


@pytest.fixture(scope="module")
def run(cluster: Cluster, readme: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Applied and watched as README says."""
    before, watched = cluster.everything(), tmp_path_factory.mktemp("copy") / "watched"
    cluster.shell(readme["apply"])
    watcher = cluster.background(readme["watch"], watched)
    yield Run(cluster, before, watched)
    watcher.send_signal(signal.SIGINT)
    watcher.wait(timeout=10)


@pytest.fixture(scope="module")
def training(run: Run) -> Run:
    """Its ranks make steps, and the kubelet has noticed that the generator answers: its probe may be a period behind the first step."""
    run.cluster.wait_for(JOB, "Running", reason="Training", seconds=START_SECONDS)
    run.cluster.wait_for(JOB, "GeneratorReady", reason="GeneratorServing", seconds=60)
    return run


@pytest.fixture(scope="module")
def succeeded(training: Run) -> Run:
    """All its steps are made."""
    training.cluster.wait_for(JOB, "Succeeded", seconds=TRAIN_SECONDS)
    return training


def test_the_operator_runs_under_its_own_service_account(installed: None, admin: Cluster) -> None:
    pod = operator_pod(admin)
    assert pod["spec"]["serviceAccountName"] == OPERATOR
    assert admin.get("namespace", SYSTEM)["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@pytest.mark.parametrize(
    ("verb", "resource", "allowed"),
    [
        ("create", "jobs.batch", "yes"),
        ("patch", "onlinetrainingjobs.onlinetraining.dev --subresource=status", "yes"),
        ("patch", "onlinetrainingjobs.onlinetraining.dev", "no"),
        ("delete", "jobs.batch", "no"),
        ("create", "pods", "no"),
        ("create", "pods --subresource=exec", "no"),
        ("get", "secrets", "no"),
    ],
)
def test_the_operator_may_do_what_it_needs_and_no_more(installed: None, admin: Cluster, verb: str, resource: str, allowed: str) -> None:
    answer = admin.shell(f"kubectl auth can-i {verb} {resource} -A --as={ACCOUNT} || true")
    assert answer.strip().splitlines()[-1] == allowed


def test_the_job_belongs_to_the_one_that_was_applied(run: Run) -> None:
    run.cluster.wait_for(JOB, "Created", reason="JobCreated", seconds=60)
    [owner] = run.cluster.get("job", JOB)["metadata"]["ownerReferences"]
    assert owner["uid"] == run.object["metadata"]["uid"]
    assert (owner["kind"], owner["name"], owner["controller"]) == ("OnlineTrainingJob", JOB, True)


def test_one_gpu_generates_and_three_train(training: Run) -> None:
    spec = training.pod["spec"]
    requests = {c["name"]: c["resources"].get("requests", {}).get(GPU) for c in spec["initContainers"] + spec["containers"]}
    assert requests == {"model": None, "generator": "1", "trainer": "3"}


def test_no_gpu_is_in_two_containers(training: Run) -> None:
    pod, ids = training.pod["metadata"]["name"], {}
    for container in ("generator", "trainer"):
        value = training.cluster.kubectl("exec", pod, "-c", container, "--", "printenv", "NVIDIA_VISIBLE_DEVICES")
        ids[container] = set(value.strip().split(","))
    assert {name: len(devices) for name, devices in ids.items()} == {"generator": 1, "trainer": 3}
    assert not ids["generator"] & ids["trainer"]


def test_the_pod_holds_no_token_of_the_api(training: Run) -> None:
    pod = training.pod
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert not [volume for volume in pod["spec"]["volumes"] if "projected" in volume or "secret" in volume]
    folder = training.cluster.shell(f"kubectl exec {pod['metadata']['name']} -c trainer -- ls /var/run/secrets/kubernetes.io 2>&1 || true")
    assert "No such file or directory" in folder


def test_the_generators_routes_cannot_be_reached_from_another_pod(training: Run, admin: Cluster) -> None:
    pod = training.pod
    from_operator = ("exec", f"deployment/{OPERATOR}", "-n", SYSTEM, "--", "python", "-c", CONNECT, pod["status"]["podIP"])
    assert admin.kubectl(*from_operator, "8081").strip() == "connected", "the launcher's port, which the operator pulls from"
    assert admin.kubectl(*from_operator, "8000").strip() == "ConnectionRefusedError"
    inside = training.cluster.kubectl("exec", pod["metadata"]["name"], "-c", "trainer", "--", "python", "-c", CONNECT, "127.0.0.1", "8000")
    assert inside.strip() == "connected", "vLLM listens, but on loopback only"


def test_the_generator_serves_while_three_ranks_train(training: Run) -> None:
    status = training.object["status"]
    conditions = {condition["type"]: condition for condition in status["conditions"]}
    assert (conditions["GeneratorReady"]["status"], conditions["GeneratorReady"]["reason"]) == ("True", "GeneratorServing")
    assert status["progress"]["worldSize"] == 3
    assert status["state"] == "Running"


def test_it_succeeds_after_all_steps_and_has_learned(succeeded: Run) -> None:
    succeeded.cluster.kubectl("wait", "--for=condition=Succeeded", f"otj/{JOB}", "--timeout=10s")
    progress = succeeded.object["status"]["progress"]
    assert (progress["step"], progress["totalSteps"], progress["steps"]) == (150, 150, "150/150")
    assert float(progress["reward"]) >= 0.95
    assert progress["worldSize"] == 3


def test_its_conditions_tell_the_end(succeeded: Run) -> None:
    found = succeeded.object
    conditions = {c["type"]: (c["status"], c["reason"]) for c in found["status"]["conditions"]}
    assert conditions == {
        "Created": ("True", "JobCreated"),
        "GeneratorReady": ("False", "Finished"),
        "Running": ("False", "Finished"),
        "WeightsInSync": ("False", "Finished"),
        "Progressing": ("False", "Finished"),
        "CheckpointFresh": ("False", "OutputNotKept"),
        "Suspended": ("False", "Finished"),
        "Succeeded": ("True", "Finished"),
    }
    assert {c["observedGeneration"] for c in found["status"]["conditions"]} == {found["metadata"]["generation"]}
    assert all(c["message"] for c in found["status"]["conditions"])
    assert found["status"]["restarts"] == 0


def test_its_gpus_are_free_when_it_has_succeeded(succeeded: Run) -> None:
    assert succeeded.pod["status"]["phase"] == "Succeeded"
    states = succeeded.pod["status"]["initContainerStatuses"] + succeeded.pod["status"]["containerStatuses"]
    assert [state["name"] for state in states if "terminated" not in state["state"]] == []
    assert {state["name"]: state["restartCount"] for state in states} == {"model": 0, "generator": 0, "trainer": 0}


def test_its_course_is_told_in_events(succeeded: Run) -> None:
    def told() -> list[str]:
        events = succeeded.cluster.items("events", "--field-selector", f"involvedObject.kind=OnlineTrainingJob,involvedObject.name={JOB}")
        events.sort(key=lambda event: event["lastTimestamp"])
        assert {event["type"] for event in events} == {"Normal"}
        return [event["reason"] for event in events]

    eventually("the last event", lambda: told()[-1] == "Finished", seconds=30)
    assert set(told()) == {"JobCreated", "Starting", "GeneratorServing", "Training", "Finished"}


def test_kubectl_get_shows_what_readme_promises(succeeded: Run) -> None:
    header, row = (line.split() for line in succeeded.cluster.kubectl("get", "otj").splitlines())
    assert header == ["NAME", "ALGORITHM", "GPUS", "STATE", "STEP", "REWARD", "AGE"]
    assert row[:5] == [JOB, "GRPO", "4", "Succeeded", "150/150"]


def test_who_watches_sees_it_start_train_and_succeed(succeeded: Run) -> None:
    eventually("the end in `kubectl get otj -w`", lambda: "Succeeded" in succeeded.watched.read_text(), seconds=30)
    states = [state for line in succeeded.watched.read_text().splitlines()[1:] for state in line.split()[3:4] if state.isalpha()]
    states = [state for state in states if state != "Ending"]  # between the last step and the end of the pod: may be too short to see
    turns = [state for index, state in enumerate(states) if index == 0 or states[index - 1] != state]
    assert turns[-3:] == ["Starting", "Running", "Succeeded"]


def test_the_trainers_log_is_kept(succeeded: Run, readme: dict[str, str]) -> None:
    assert "step 150/150" in succeeded.cluster.shell(readme["logs"])


def test_deleting_it_leaves_nothing_behind(succeeded: Run) -> None:
    cluster = succeeded.cluster
    cluster.kubectl("delete", "otj", JOB, f"--timeout={DELETE_SECONDS:.0f}s", seconds=DELETE_SECONDS + 30)
    eventually("an empty namespace", lambda: cluster.everything() <= succeeded.before, seconds=DELETE_SECONDS)


def test_deleting_one_that_runs_frees_its_gpus(cluster: Cluster, readme: dict[str, str]) -> None:
    cluster.shell(readme["apply"])
    eventually("the trainer runs", lambda: _trainer_runs(cluster), seconds=START_SECONDS)
    cluster.kubectl("delete", "otj", JOB)
    eventually("no pod is left", lambda: not cluster.pods(JOB), seconds=60)
    assert json.loads(cluster.kubectl("get", "jobs", "-o", "json"))["items"] == []


def _trainer_runs(cluster: Cluster) -> bool:
    statuses = [status for pod in cluster.pods(JOB) for status in pod["status"].get("containerStatuses", [])]
    return any("running" in status["state"] for status in statuses)
