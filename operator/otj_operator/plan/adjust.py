"""What the operator changes of a Job that exists, and of its Workload under Kueue: pause, limits, and its own marks. Pure.

                    without Kueue                                   under Kueue
    pause           Job.spec.suspend true, marked as ours           Workload.spec.active false, marked as ours
    resume          suspend false, only if the mark is there        active true, only if the mark is there
    limits          the Job's own fields, which Kubernetes lets change
    label, owner    put back if somebody took them away
    parallelism     one pod: with none the run waits for ever, and says nothing of it

Suspending a Job ends its pod with SIGTERM and a grace period, in which the trainer saves; a resumed Job makes a new pod, which finds
the checkpoint. The mark is written together with the change, on the object that it is about, so no crash can part the two, and a
Job that a queue (or a person) holds back is never set free by us.
"""

from __future__ import annotations

from typing import Any

from otj_operator.plan.children import JobView
from otj_operator.plan.observed import Observed
from otj_operator.plan.parent import Limits, Parent
from otj_operator.plan.steps import Patch, Target
from otj_runtime.pod.manifest import job_labels, owner_reference
from otj_runtime.pod.names import MANAGED_BY, SUSPENDED_BY_ANNOTATION

Object = dict[str, Any]


def adjustment(observed: Observed, job: JobView) -> Patch | None:
    """The next change to make, or None if everything is as the spec says."""
    if job.ended or job.deleting or observed.refusal is not None:
        return None
    body = _job_body(observed.parent, job, suspends=not queued(observed, job) and job.failing is None)
    if body:
        body.setdefault("metadata", {})["resourceVersion"] = job.resource_version
        return Patch(target=Target.JOB, name=job.key.name, body=body)
    return _workload_patch(observed)


def queued(observed: Observed, job: JobView) -> bool:
    """Whether Kueue manages the Job: it names a queue, or Kueue, which may manage Jobs that name none, keeps a Workload for it."""
    return bool(job.queue) or observed.workload is not None


def _job_body(parent: Parent, job: JobView, *, suspends: bool) -> Object:
    spec: Object = {}
    metadata: Object = {}
    wanted, found = Limits.of(parent.spec).to_wire(), job.limits.to_wire()
    spec |= {name: value for name, value in wanted.items() if value != found[name]}
    if job.parallelism != 1:
        spec["parallelism"] = 1
    if suspends and parent.paused and not job.suspended:
        spec["suspend"] = True
        metadata["annotations"] = {SUSPENDED_BY_ANNOTATION: MANAGED_BY}
    elif suspends and not parent.paused and job.suspended and job.suspended_by_us:
        spec["suspend"] = False
        metadata["annotations"] = {SUSPENDED_BY_ANNOTATION: None}
    if not job.labelled:
        metadata["labels"] = job_labels(job.key.name)
    if job.owner is None:
        metadata["ownerReferences"] = [owner_reference(name=parent.key.name, uid=parent.uid)]
    return {name: part for name, part in (("metadata", metadata), ("spec", spec)) if part}


def _workload_patch(observed: Observed) -> Patch | None:
    parent, workload = observed.parent, observed.workload
    if workload is None:
        return None
    if parent.paused and workload.active:
        active, mark = False, MANAGED_BY
    elif not parent.paused and not workload.active and workload.paused_by_us:
        active, mark = True, None
    else:
        return None
    metadata = {"annotations": {SUSPENDED_BY_ANNOTATION: mark}, "resourceVersion": workload.resource_version}
    return Patch(target=Target.WORKLOAD, name=workload.name, body={"metadata": metadata, "spec": {"active": active}})
