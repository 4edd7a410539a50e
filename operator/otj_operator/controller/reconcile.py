"""One pass for one job: observe, plan, act. Nothing here decides; `otj_operator.plan` does.

Every answer of the API server goes into the cache at once, so that the next pass does not wait for the watch to bring it back. A pass
that has created a Job ends with that: what to say of it is the next pass, which in a burst waits until every job has its Job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from otj_operator.controller import changes
from otj_operator.controller.cache import Cache
from otj_operator.controller.teller import Teller
from otj_operator.kube import JOBS, ONLINE_TRAINING_JOBS, ApiError, Cluster, Resource
from otj_operator.metrics import Metrics
from otj_operator.plan import Ask, Create, JobView, Key, Look, Observed, Parent, Patch, Refusal, RefusalKind, Report, Settle, Told, plan
from otj_operator.plan.draft import finished
from otj_operator.plan.planner import taken
from otj_runtime.pod.manifest import Manifest

logger = logging.getLogger(__name__)

Object = dict[str, Any]

STEPS = 8
"""More than a pass can need: a look, a creation, a patch of the Job and one of its Workload, a question, and the end."""


class Reconciler:
    """Brings single jobs to where they should be."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        *,
        image: str,
        report_of: Callable[[Key], Report | None],
        silent_since: Callable[[Key], datetime | None],
        teller: Teller,
        metrics: Metrics,
        wrote: Callable[[Resource, Object], None],
    ) -> None:
        self._cluster, self._cache, self._image, self._report_of = cluster, cache, image, report_of
        self._silent_since = silent_since
        self._teller, self._metrics, self._wrote = teller, metrics, wrote
        self._written: dict[Key, datetime] = {}
        self._told: dict[Key, Told] = {}
        self.workloads: Resource | None = None
        """Where the cluster keeps Kueue's Workloads, if it does."""

    async def reconcile(self, key: Key) -> Settle | None:
        """One pass; None if the job is gone.

        Raises:
            ApiError: when the API server cannot do it now; the pass may be tried again.
        """
        parent = self._cache.parents.newest(key)
        if parent is None:
            self._written.pop(key, None)
            self._told.pop(key, None)
            self._cache.forget_gone(key)
            return None
        job = self._cache.job_of(parent)
        observed = Observed(
            parent=parent,
            job=job,
            bereft=self._cache.bereft(parent),
            workload=self._cache.workload_of(job),
            told=self._told.get(key),
            pods=self._cache.pods.of(key),
            report=self._report_of(key),
            silent_since=self._silent_since(key),
            written_at=self._written.get(key),
        )
        try:
            return await self._pursue(key, observed)
        except ApiError as error:
            if not error.absent:
                raise
            # Deleted between a listing and the watch that began after it, so that no watch will ever tell: it must not be tried for ever.
            self._cache.parents.remove(parent)
            return Settle(again_after=0.0)

    async def _pursue(self, key: Key, observed: Observed) -> Settle:
        for _ in range(STEPS):
            match plan(observed, now=datetime.now(UTC), image=self._image):
                case Look():
                    observed = await self._look(observed)
                case Create(manifest):
                    observed = await self._create(observed, manifest)
                    if observed.refusal is None:
                        return Settle(again_after=0.0)
                case Patch() as change:
                    observed = await changes.patch(self._cluster, self._cache, observed, change, workloads=self.workloads)
                case Ask(uid):
                    observed = await changes.ask(self._cluster, observed, uid)
                    if observed.told is not None:
                        self._told[key] = observed.told
                case Settle() as settled:
                    await self._settle(observed.parent, settled)
                    return settled
        raise AssertionError(f"{key}: a plan that never settles")

    async def _look(self, observed: Observed) -> Observed:
        key = observed.parent.key
        raw = await self._cluster.get(JOBS, namespace=key.namespace, name=key.name)
        return replace(observed, job=JobView.of(raw) if raw else None, absence_confirmed=raw is None)

    async def _create(self, observed: Observed, manifest: Manifest) -> Observed:
        parent = observed.parent
        try:
            raw = await self._cluster.create(JOBS, manifest)
        except ApiError as error:
            return await self._not_created(observed, error)
        logger.info("created the Job", extra={"job": parent.key})
        job = JobView.of(raw)
        self._cache.jobs.put(job)
        self._wrote(JOBS, raw)
        self._metrics.until_job.observe(parent.age(datetime.now(UTC)))
        return replace(observed, job=job)

    async def _not_created(self, observed: Observed, error: ApiError) -> Observed:
        if error.status == 409 and error.reason == "AlreadyExists":
            found = await self._look(observed)
            if found.job is None:
                raise error
            # Ours after all: the cache lags behind an earlier pass, maybe of an earlier process.
            owner = found.job.owner
            if owner is not None and owner.uid == observed.parent.uid:
                self._cache.jobs.put(found.job)
                return found
            return replace(found, refusal=taken(found.job, observed.parent))
        kinds = {400: RefusalKind.INVALID, 422: RefusalKind.INVALID, 403: RefusalKind.FORBIDDEN}
        if error.status not in kinds:
            raise error
        return replace(observed, refusal=Refusal(kind=kinds[error.status], message=f"The API server refused the Job: {error.message}"))

    async def _settle(self, parent: Parent, settled: Settle) -> None:
        if settled.status is not None:
            await self._write(parent, settled.status)
        if finished(settled.status or parent.status):
            self._cache.forget_gone(parent.key)
        for event in settled.events:
            self._teller.tell(parent, event)

    async def _write(self, parent: Parent, status: Object) -> None:
        key = parent.key
        raw = await self._cluster.set_status(
            ONLINE_TRAINING_JOBS,
            namespace=key.namespace,
            name=key.name,
            status=status,
            resource_version=parent.resource_version,
        )
        self._written[key] = datetime.now(UTC)
        self._cache.parents.put(Parent.of(raw))
        self._wrote(ONLINE_TRAINING_JOBS, raw)
        self._metrics.written(parent.age(self._written[key]), parent.status, status)
