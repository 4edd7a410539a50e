"""What the operator sees of the cluster, cut down to what decisions need.

The cache holds these instead of whole objects: a pod of 10 KiB becomes a few hundred bytes, and every place where a field of the API
is read stands in this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

from otj_runtime.api.lifecycle import OPERATOR
from otj_runtime.pod import names
from otj_runtime.pod.manifest import job_labels
from otj_runtime.pod.metrics import LauncherReport

Object = dict[str, Any]


class Key(NamedTuple):
    """Names one OnlineTrainingJob; its Job has the same name, its pods carry the name as a label."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What Kubernetes lets change of a Job that exists; as the spec names them, and the Job too."""

    backoff_limit: int
    active_deadline_seconds: int | None
    ttl_seconds_after_finished: int | None

    @classmethod
    def of(cls, spec: Object) -> Limits:
        """The limits in the spec of an OnlineTrainingJob or of a Job."""
        return cls(
            backoff_limit=spec.get("backoffLimit", 3),
            active_deadline_seconds=spec.get("activeDeadlineSeconds"),
            ttl_seconds_after_finished=spec.get("ttlSecondsAfterFinished"),
        )

    def to_wire(self) -> Object:
        """The fields, None where there is no limit."""
        return {
            "backoffLimit": self.backoff_limit,
            "activeDeadlineSeconds": self.active_deadline_seconds,
            "ttlSecondsAfterFinished": self.ttl_seconds_after_finished,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """An OnlineTrainingJob. `document` is what the user wrote, unparsed: it may be anything that an older CRD let pass."""

    key: Key
    uid: str
    generation: int
    resource_version: str
    created: str
    deleting: bool
    document: Object
    status: Object

    def age(self, now: datetime) -> float:
        """Seconds since its creation, which Kubernetes tells in whole seconds, cut off."""
        return max(0.0, (now - datetime.fromisoformat(self.created)).total_seconds())

    @classmethod
    def of(cls, raw: Object) -> Parent:
        """The view of an object as the API server sends it."""
        metadata = raw["metadata"]
        carried = {name: metadata[name] for name in ("name", "namespace", "uid", "generation", "labels", "annotations") if name in metadata}
        carried.get("annotations", {}).pop("kubectl.kubernetes.io/last-applied-configuration", None)
        return cls(
            key=Key(metadata["namespace"], metadata["name"]),
            uid=metadata["uid"],
            generation=metadata.get("generation", 0),
            resource_version=metadata["resourceVersion"],
            created=metadata["creationTimestamp"],
            deleting="deletionTimestamp" in metadata,
            document={"apiVersion": raw["apiVersion"], "kind": raw["kind"], "metadata": carried, "spec": raw.get("spec")},
            status=raw.get("status") or {},
        )

    @property
    def spec(self) -> Object:
        """The spec as it was written."""
        return self.document["spec"] or {}

    @property
    def paused(self) -> bool:
        """Whether the user wants it suspended."""
        return self.spec.get("suspend") is True

    @property
    def ours(self) -> bool:
        """Whether it is this operator's to act on."""
        return bool(self.spec.get("managedBy", OPERATOR) == OPERATOR)

    @property
    def queue(self) -> str:
        """The Kueue queue that it asks for, or nothing."""
        return str(self.document["metadata"].get("labels", {}).get(names.QUEUE_LABEL, ""))

    @property
    def keeps_output(self) -> bool:
        """Whether its checkpoints outlive a pod."""
        return bool((self.spec.get("output") or {}).get("claimName"))

    @property
    def save_steps(self) -> int:
        """Steps between two checkpoints."""
        return int((self.spec.get("output") or {}).get("saveSteps", 50))


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The controller of an object."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEnd:
    """How a Job ended, in the Job controller's words."""

    reason: str
    message: str
    time: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobView:
    """A batch/v1 Job."""

    key: Key
    uid: str
    resource_version: str
    deleting: bool
    owner: Owner | None
    suspended: bool
    suspended_by_us: bool
    queue: str
    labelled: bool
    limits: Limits
    pods_made: int
    pods_failed: int
    completed: JobEnd | None
    failed: JobEnd | None
    failing: JobEnd | None

    @property
    def ended(self) -> bool:
        """Whether the Job controller has said how it ended."""
        return self.completed is not None or self.failed is not None

    @classmethod
    def of(cls, raw: Object) -> JobView:
        """The view of an object as the API server sends it."""
        metadata, status = raw["metadata"], raw.get("status") or {}
        ends = {c["type"]: _end(c) for c in status.get("conditions") or [] if c.get("status") == "True"}
        return cls(
            key=Key(metadata["namespace"], metadata["name"]),
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            deleting="deletionTimestamp" in metadata,
            owner=_owner(metadata),
            suspended=bool(raw["spec"].get("suspend")),
            suspended_by_us=_marked(metadata),
            queue=(metadata.get("labels") or {}).get(names.QUEUE_LABEL, ""),
            labelled=job_labels(metadata["name"]).items() <= (metadata.get("labels") or {}).items(),
            limits=Limits.of(raw["spec"]),
            pods_made=sum(status.get(count) or 0 for count in ("active", "succeeded", "failed")),
            pods_failed=status.get("failed") or 0,
            completed=ends.get("Complete"),
            failed=ends.get("Failed"),
            failing=ends.get("FailureTarget"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A condition of somebody else's, in its own words."""

    status: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadView:
    """What Kueue keeps about a Job. Its key is the Job's."""

    key: Key
    name: str
    uid: str
    resource_version: str
    job_uid: str
    active: bool
    paused_by_us: bool
    quota: Verdict | None
    evicted: Verdict | None

    @classmethod
    def of(cls, raw: Object) -> WorkloadView:
        """The view of an object as the API server sends it; one that no Job owns concerns nobody here and has an empty key."""
        metadata, spec = raw["metadata"], raw.get("spec") or {}
        owner = _owner(metadata)
        of_job = owner is not None and owner.kind == "Job"
        said = {c["type"]: c for c in (raw.get("status") or {}).get("conditions") or []}
        evicted = said.get("Evicted")
        return cls(
            key=Key(metadata["namespace"], owner.name if owner is not None and of_job else ""),
            name=metadata["name"],
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            job_uid=owner.uid if owner is not None and of_job else "",
            active=spec.get("active", True) is not False,
            paused_by_us=_marked(metadata),
            quota=_verdict(said["QuotaReserved"]) if "QuotaReserved" in said else None,
            evicted=_verdict(evicted) if evicted is not None and evicted.get("status") == "True" else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerView:
    """A container's state: waiting, running, terminated, or nothing yet."""

    name: str
    state: str
    reason: str = ""
    message: str = ""
    exit_code: int | None = None
    ready: bool = False
    restarts: int = 0
    previous_end: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView:
    """A pod of a Job of ours."""

    key: Key
    name: str
    uid: str
    resource_version: str
    job_uid: str
    created: str
    deleting: bool
    due: str
    """When it must have ended, once it is being deleted."""
    phase: str
    reason: str
    message: str
    ip: str
    progress_port: int | None
    start_time: str | None
    unschedulable: str
    model: ContainerView
    generator: ContainerView
    trainer: ContainerView

    @property
    def live(self) -> bool:
        """Whether it may still hold its GPUs."""
        return self.phase not in ("Succeeded", "Failed")

    @classmethod
    def of(cls, raw: Object) -> PodView:
        """The view of an object as the API server sends it."""
        metadata, status = raw["metadata"], raw.get("status") or {}
        owner = _owner(metadata)
        containers = {c["name"]: _container(c) for kind in ("initContainerStatuses", "containerStatuses") for c in status.get(kind) or []}
        scheduled: Object = next((c for c in status.get("conditions") or [] if c["type"] == "PodScheduled"), {})
        return cls(
            key=Key(metadata["namespace"], metadata["labels"][names.JOB_LABEL]),
            name=metadata["name"],
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            job_uid=owner.uid if owner else "",
            created=metadata["creationTimestamp"],
            deleting="deletionTimestamp" in metadata,
            due=metadata.get("deletionTimestamp", ""),
            phase=status.get("phase", "Pending"),
            reason=status.get("reason", ""),
            message=status.get("message", ""),
            ip=status.get("podIP", ""),
            progress_port=_progress_port(raw["spec"]),
            start_time=status.get("startTime"),
            unschedulable=scheduled.get("message", "") if scheduled.get("status") == "False" else "",
            **{
                name: containers.get(name, ContainerView(name=name, state=""))
                for name in (names.MODEL_CONTAINER, names.GENERATOR_CONTAINER, names.TRAINER_CONTAINER)
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the launcher of one pod last told."""

    pod_uid: str
    body: LauncherReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What the API server's Events last warned of about one object; empty words if of nothing."""

    uid: str
    reason: str = ""
    message: str = ""
    at: datetime

    @classmethod
    def of(cls, uid: str, events: list[Object], *, at: datetime) -> Told:
        """The newest warning among `events`."""
        newest: Object = max(events, key=lambda e: e.get("lastTimestamp") or e.get("eventTime") or "", default={})
        return cls(uid=uid, reason=newest.get("reason", ""), message=newest.get("message", ""), at=at)


class RefusalKind(StrEnum):
    """Why the Job could not be created."""

    TAKEN = "taken"
    """A Job of this name belongs to somebody else."""
    PREDECESSOR = "predecessor"
    """The Job of an earlier OnlineTrainingJob of this name is still being removed."""
    INVALID = "invalid"
    """The API server will never take it."""
    FORBIDDEN = "forbidden"
    """The API server does not take it now: a quota, or a right that the operator lacks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """The answer to an attempt to create the Job in this pass, or (kind FORBIDDEN or INVALID) to change it."""

    kind: RefusalKind
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything that one decision is made from.

    `job` None means that the cache has none; `absence_confirmed` that the API server has none either. `written_at` is when this
    process last wrote the status.
    """

    parent: Parent
    job: JobView | None = None
    absence_confirmed: bool = False
    pods: tuple[PodView, ...] = ()
    report: Report | None = None
    refusal: Refusal | None = None
    workload: WorkloadView | None = None
    told: Told | None = None
    written_at: datetime | None = None


def _owner(metadata: Object) -> Owner | None:
    for reference in metadata.get("ownerReferences") or []:
        if reference.get("controller"):
            return Owner(kind=reference["kind"], name=reference["name"], uid=reference["uid"])
    return None


def _marked(metadata: Object) -> bool:
    return bool((metadata.get("annotations") or {}).get(names.SUSPENDED_BY_ANNOTATION) == names.MANAGED_BY)


def _verdict(condition: Object) -> Verdict:
    return Verdict(status=condition["status"], reason=condition.get("reason", ""), message=condition.get("message", ""))


def _end(condition: Object) -> JobEnd:
    return JobEnd(reason=condition.get("reason", ""), message=condition.get("message", ""), time=condition.get("lastTransitionTime", ""))


def _container(status: Object) -> ContainerView:
    states: Object = status.get("state") or {}
    state = next(iter(states), "")
    details: Object = states.get(state) or {}
    previous = (status.get("lastState") or {}).get("terminated")
    return ContainerView(
        name=status["name"],
        state=state,
        reason=details.get("reason", ""),
        message=details.get("message", ""),
        exit_code=details.get("exitCode"),
        ready=bool(status.get("ready")),
        restarts=status.get("restartCount", 0),
        previous_end=f"{previous.get('reason', 'ended')}, exit code {previous.get('exitCode')}" if previous else "",
    )


def _progress_port(spec: Object) -> int | None:
    for container in spec.get("containers", []):
        for port in container.get("ports") or []:
            if port.get("name") == names.PROGRESS_PORT_NAME:
                return int(port["containerPort"])
    return None
