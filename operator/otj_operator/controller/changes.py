"""Steps of a pass beside creation: patches of a Job or its Workload, and questions to the Events. The answer goes back to `plan`."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from otj_operator.controller.cache import Cache
from otj_operator.kube import EVENTS, JOBS, ApiError, Cluster, Resource
from otj_operator.plan import JobView, Observed, Patch, Refusal, RefusalKind, Target, Told, WorkloadView


async def patch(cluster: Cluster, cache: Cache, observed: Observed, step: Patch, *, workloads: Resource | None) -> Observed:
    """Make the change; that the object is gone, or a refusal that only somebody else can cure, is an answer too.

    Raises:
        ApiError: if the API server cannot do it now, or the object has changed since (409).
    """
    namespace = observed.parent.key.namespace
    try:
        if step.target is Target.JOB:
            job = JobView.of(await cluster.merge(JOBS, step.body, namespace=namespace, name=step.name))
            cache.jobs.put(job)
            return replace(observed, job=job)
        assert workloads is not None, "a Workload was seen, so its kind is known"
        workload = WorkloadView.of(await cluster.merge(workloads, step.body, namespace=namespace, name=step.name))
        cache.workloads.put(workload)
        return replace(observed, workload=workload)
    except ApiError as error:
        if error.absent:
            return _without(cache, observed, step.target)
        if error.status not in (400, 403, 422):
            raise
        refused = f"The {step.target} {step.name} is not as the spec says, because the API server refused the change: {error.message}"
        return replace(observed, refusal=Refusal(kind=RefusalKind.FORBIDDEN, message=refused))


def _without(cache: Cache, observed: Observed, target: Target) -> Observed:
    """What is left of `observed` without the object that no watch has said is gone."""
    if target is Target.JOB and observed.job is not None:
        cache.jobs.remove(observed.job)
        return replace(observed, job=None, bereft=True)
    if target is Target.WORKLOAD and observed.workload is not None:
        cache.workloads.remove(observed.workload)
    return replace(observed, workload=None)


async def ask(cluster: Cluster, observed: Observed, uid: str) -> Observed:
    """What Events warn of about the object with this uid."""
    warnings = f"involvedObject.uid={uid},type=Warning"
    events, _ = await cluster.list(EVENTS, dict, namespace=observed.parent.key.namespace, fields=warnings)
    return replace(observed, told=Told.of(uid, events, at=datetime.now(UTC)))
