"""What the operator sees of a job's children: the Job, and the Workload that Kueue keeps about it.

The cache holds these and `PodView` instead of whole objects, which are many times larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from otj_operator.plan.parent import Key, Limits
from otj_runtime.pod import names
from otj_runtime.pod.manifest import job_labels

Object = dict[str, Any]


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
    parallelism: int
    limits: Limits
    pods_active: int
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
            owner=owner_of(metadata),
            suspended=bool(raw["spec"].get("suspend")),
            suspended_by_us=_marked(metadata),
            queue=(metadata.get("labels") or {}).get(names.QUEUE_LABEL, ""),
            labelled=job_labels(metadata["name"]).items() <= (metadata.get("labels") or {}).items(),
            parallelism=raw["spec"].get("parallelism", 1),
            limits=Limits.of(raw["spec"]),
            pods_active=status.get("active") or 0,
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
        owner = owner_of(metadata)
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


def owner_of(metadata: Object) -> Owner | None:
    """The controller that `metadata` names."""
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
