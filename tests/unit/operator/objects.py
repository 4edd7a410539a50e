"""Objects as the API server sends them, for tests of decisions: each function makes one, keywords say what is special."""

from __future__ import annotations

import copy
from datetime import UTC, datetime, timedelta
from typing import Any

from otj_operator.plan import JobView, Parent, PodView, Report, Told, WorkloadView
from otj_runtime.api import Progress
from otj_runtime.pod.manifest import job_labels
from otj_runtime.pod.metrics import LauncherReport
from otj_runtime.pod.names import MANAGED_BY, QUEUE_LABEL, SUSPENDED_BY_ANNOTATION
from tests.unit.api.specs import changed

Object = dict[str, Any]

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
IMAGE = "runtime:test"


def at(seconds: float) -> datetime:
    """A moment after NOW."""
    return NOW + timedelta(seconds=seconds)


def parent(
    *,
    status: Object | None = None,
    uid: str = "parent-1",
    generation: int = 1,
    version: int = 1,
    deleting: bool = False,
    queue: str = "",
    claim: str = "",
    **changes: Any,
) -> Parent:
    """An OnlineTrainingJob named run, in a Kueue queue and with an output claim if named; further keywords change its spec."""
    document = changed(changes | ({"output.claimName": claim} if claim else {}))
    if queue:
        document["metadata"]["labels"] = {QUEUE_LABEL: queue}
    document["metadata"] |= {
        "uid": uid,
        "generation": generation,
        "resourceVersion": str(version),
        "creationTimestamp": "2026-01-01T11:59:50Z",
    }
    if deleting:
        document["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    return Parent.of(document | {"status": copy.deepcopy(status or {})})


def job(
    *,
    owner: str | None = "parent-1",
    owner_kind: str = "OnlineTrainingJob",
    uid: str = "job-1",
    suspend: bool = False,
    deleting: bool = False,
    end: tuple[str, str] | None = None,
    message: str = "",
    version: int = 1,
    marked: bool = False,
    queue: str = "",
    labelled: bool = True,
    parallelism: int = 1,
    limits: Object | None = None,
    **counts: int,
) -> JobView:
    """The Job named run. `end` is (Complete or Failed, reason); `counts` are active, succeeded and failed pods; `marked` is whether
    the operator suspended it."""
    labels = (job_labels("run") if labelled else {}) | ({QUEUE_LABEL: queue} if queue else {})
    metadata: Object = {"name": "run", "namespace": "default", "uid": uid, "resourceVersion": str(version), "labels": labels}
    if marked:
        metadata["annotations"] = {SUSPENDED_BY_ANNOTATION: MANAGED_BY}
    if owner is not None:
        metadata["ownerReferences"] = [{"kind": owner_kind, "name": "run", "uid": owner, "controller": True}]
    if deleting:
        metadata["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    conditions = []
    if end is not None:
        time = "2026-01-01T13:00:00Z"
        conditions = [{"type": end[0], "status": "True", "reason": end[1], "message": message, "lastTransitionTime": time}]
    spec = {"suspend": suspend, "backoffLimit": 3, "parallelism": parallelism} | (limits or {})
    return JobView.of({"metadata": metadata, "spec": spec, "status": {"conditions": conditions, **counts}})


def workload(
    *, active: bool = True, marked: bool = False, quota: tuple[str, str, str] | None = None, evicted: tuple[str, str] | None = None
) -> WorkloadView:
    """Kueue's Workload of the Job; `quota` is (status, reason, message), `evicted` (reason, message)."""
    metadata: Object = {
        "name": "job-run-1a2b3",
        "namespace": "default",
        "uid": "workload-1",
        "resourceVersion": "1",
        "ownerReferences": [{"kind": "Job", "name": "run", "uid": "job-1", "controller": True}],
    }
    if marked:
        metadata["annotations"] = {SUSPENDED_BY_ANNOTATION: MANAGED_BY}
    conditions = []
    if quota is not None:
        conditions.append({"type": "QuotaReserved", "status": quota[0], "reason": quota[1], "message": quota[2]})
    if evicted is not None:
        conditions.append({"type": "Evicted", "status": "True", "reason": evicted[0], "message": evicted[1]})
    return WorkloadView.of({"metadata": metadata, "spec": {"active": active}, "status": {"conditions": conditions}})


def told(reason: str, message: str, *, uid: str, seconds: float = 0) -> Told:
    """A warning of the API server's Events."""
    return Told.of(uid, [{"reason": reason, "message": message, "lastTimestamp": "2026-01-01T12:00:00Z"}], at=at(seconds))


def pod(
    *,
    name: str = "run-1",
    job_uid: str = "job-1",
    phase: str = "Running",
    created: str = "2026-01-01T12:00:10Z",
    ip: str = "10.0.0.7",
    deleting: bool = False,
    due: str = "2026-01-01T12:02:00Z",
    unschedulable: str = "",
    reason: str = "",
    message: str = "",
    version: int = 1,
    **states: Object,
) -> PodView:
    """A pod of the Job; `states` are container statuses by name: model, generator, trainer."""
    metadata: Object = {
        "name": name,
        "namespace": "default",
        "uid": f"uid-{name}",
        "resourceVersion": str(version),
        "creationTimestamp": created,
        "labels": {"onlinetraining.dev/job": "run"},
        "ownerReferences": [{"kind": "Job", "name": "run", "uid": job_uid, "controller": True}],
    }
    if deleting:
        metadata["deletionTimestamp"] = due
    scheduled = {"type": "PodScheduled", "status": "False" if unschedulable else "True", "message": unschedulable}
    status = {
        "phase": phase,
        "reason": reason,
        "message": message,
        "podIP": ip,
        "startTime": "2026-01-01T12:00:20Z",
        "conditions": [scheduled],
        "initContainerStatuses": [{"name": name} | state for name, state in states.items() if name != "trainer"],
        "containerStatuses": [{"name": name} | state for name, state in states.items() if name == "trainer"],
    }
    ports = [{"name": "progress", "containerPort": 8081}]
    return PodView.of({"metadata": metadata, "spec": {"containers": [{"name": "trainer", "ports": ports}]}, "status": status})


def running(*, ready: bool = False) -> Object:
    """A container that runs."""
    return {"state": {"running": {}}, "ready": ready}


def waiting(reason: str, message: str = "") -> Object:
    """A container that waits."""
    return {"state": {"waiting": {"reason": reason, "message": message}}}


def ended(exit_code: int, message: str = "", *, reason: str = "Error") -> Object:
    """A container that ended."""
    return {"state": {"terminated": {"exitCode": exit_code, "reason": reason, "message": message}}}


def training_pod(**changes: Any) -> PodView:
    """A pod whose trainer runs beside a generator that answers."""
    return pod(**({"model": ended(0), "generator": running(ready=True), "trainer": running(ready=True)} | changes))


def report(
    step: int | None = None,
    *,
    total: int = 150,
    reward: str = "0.5",
    pod_name: str = "run-1",
    phase: str = "training",
    overdue: str | None = None,
    **progress: Any,
) -> Report:
    """What a launcher told; further keywords are fields of its progress."""
    told = Progress() if step is None else Progress(step=step, total_steps=total, reward=reward, **progress)
    body = {"phase": phase, "generatorReady": True, "overdue": overdue, "progress": told.to_wire()}
    return Report(pod_uid=f"uid-{pod_name}", body=LauncherReport.model_validate(body))
