"""Cache, queue, workers and the periodic listing, tied together.

watch event --apply--> cache --key--> queue --> worker: reconcile --> API server
listing, each few minutes and after each that a watch begins with,      |
  heals what watches missed -----------------------------^              |
launcher --progress puller--> report ---------------key--^ <--again_after-'

What the listings and our own writes know and a watch does not tell within a time is a stall (`freshness`).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from otj_operator.controller.cache import Cache, Shelf, V
from otj_operator.controller.freshness import Freshness
from otj_operator.controller.progress import ProgressPuller, open_launcher_session
from otj_operator.controller.queue import KeyedQueue
from otj_operator.controller.reconcile import Reconciler
from otj_operator.controller.settings import Settings
from otj_operator.controller.teller import Teller
from otj_operator.kube import JOBS, ONLINE_TRAINING_JOBS, PODS, ApiError, Cluster, FencedError, Resource
from otj_operator.metrics import JobLabels, Metrics, labels_of
from otj_operator.plan import JobView, Key, Parent, PodView, Settle, WorkloadView
from otj_runtime.pod import names

logger = logging.getLogger(__name__)

Object = dict[str, Any]

OWN = f"{names.MANAGED_BY_LABEL}={names.MANAGED_BY}"
"""Selects the Jobs and pods that this operator made."""


WATCHES_BEGIN_SECONDS = 1.0
"""Between the listing with which a watch begins and ours."""

LISTING_RETRY_SECONDS = 30.0
"""After a listing that failed, which may have been the one that finds what a watch will never tell."""


class Controller:
    """Everything that runs while this process leads."""

    def __init__(self, cluster: Cluster, settings: Settings, metrics: Metrics) -> None:
        self._cluster, self._settings, self._metrics = cluster, settings, metrics
        self._cache = Cache()
        self._queue: KeyedQueue[Key] = KeyedQueue(urgent=self._cache.unborn)
        self._freshness = Freshness()
        self._puller = ProgressPuller(settings, metrics, changed=self._queue.add)
        self._teller = Teller(cluster, metrics)
        self._reconciler = Reconciler(
            cluster,
            self._cache,
            image=settings.runtime_image,
            report_of=self._puller.report_of,
            silent_since=self._puller.silent_since,
            teller=self._teller,
            metrics=metrics,
            wrote=self._owes,
        )
        self._listed_at = float("-inf")
        self._watch_began = asyncio.Event()
        metrics.watch(jobs=self._labels, depth=lambda: len(self._queue), ages=self._freshness.ages)

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Where it looks for jobs; empty: everywhere."""
        return self._settings.namespaces

    def troubles(self) -> list[str]:
        """Why this process has lost touch with the cluster: sentences for /healthz, none if all is well."""
        stalled = [f"the watch of {kind} has stalled" for kind in self._freshness.stalled(self._settings.stall_seconds)]
        # Three missed listings in a row; the API server may be away for a while.
        deaf = time.monotonic() - self._listed_at > 3 * self._settings.resync_seconds
        return [*stalled, *(["the listings fail"] if deaf else [])]

    def parent_changed(self, raw: Object, *, deleted: bool) -> None:
        """A watch told of an OnlineTrainingJob."""
        self._told(ONLINE_TRAINING_JOBS, raw)
        self._changed(self._cache.parents, Parent.of(raw), deleted)

    def job_changed(self, raw: Object, *, deleted: bool) -> None:
        """A watch told of a Job."""
        self._told(JOBS, raw)
        self._changed(self._cache.jobs, JobView.of(raw), deleted)

    def pod_changed(self, raw: Object, *, deleted: bool) -> None:
        """A watch told of a pod."""
        self._told(PODS, raw)
        if names.JOB_LABEL in raw["metadata"].get("labels", {}):
            self._changed(self._cache.pods, PodView.of(raw), deleted)

    def workload_changed(self, raw: Object, *, deleted: bool) -> None:
        """A watch told of a Workload of Kueue's."""
        assert self.workloads is not None, "it is watched only where it is"
        self._told(self.workloads, raw)
        view = WorkloadView.of(raw)
        if view.job_uid:
            self._changed(self._cache.workloads, view, deleted)

    def watch_begins(self, path: str) -> None:
        """A watch began anew, with a listing of `path`. It will never tell of what was deleted before, so a listing of our own must."""
        for resource in (ONLINE_TRAINING_JOBS, JOBS, PODS, *([self.workloads] if self.workloads is not None else [])):
            for namespace in self._settings.namespaces or (None,):
                if path.endswith(resource.path(namespace)):
                    self._freshness.anew(self._watch(resource, namespace or ""))
                    self._watch_began.set()

    @property
    def workloads(self) -> Resource | None:
        """Where the cluster keeps Kueue's Workloads, as of the last listing; None where there is no Kueue."""
        return self._reconciler.workloads

    async def listed(self) -> None:
        """List everything once, take it into the cache and queue what changed by it."""
        # A Kueue that is installed later is noticed here; its Workloads are watched from the operator's next start on.
        version = await self._cluster.preferred_version(names.KUEUE)
        self._reconciler.workloads = Resource(names.KUEUE, version, "workloads") if version is not None else None
        for namespace in self._settings.namespaces or (None,):
            # Jobs first: the other way round, one deleted with its parent between the listings would leave a parent that seems to have none.
            jobs = await self._list(JOBS, JobView, self._cache.jobs, OWN, namespace)
            parents = await self._list(ONLINE_TRAINING_JOBS, Parent, self._cache.parents, "", namespace)
            pods = await self._list(PODS, PodView, self._cache.pods, f"{OWN},{names.JOB_LABEL}", namespace)
            workloads: set[Key] = set()
            if self.workloads is not None:
                workloads = await self._list(self.workloads, WorkloadView, self._cache.workloads, "", namespace)
            for key in parents | jobs | pods | workloads:
                self._queue.add(key)
        self._listed_at = time.monotonic()

    async def run(self) -> None:
        """Work until cancelled. `listed` comes first, so that no worker decides on half a picture."""
        async with open_launcher_session() as session, asyncio.TaskGroup() as tasks:
            for _ in range(self._settings.workers):
                tasks.create_task(self._work())
            for _ in range(self._settings.progress_connections):
                tasks.create_task(self._puller.work(session))
            tasks.create_task(self._teller.work())
            tasks.create_task(self._resync())

    async def drained(self) -> None:
        """Wait until every event told so far was posted: at a stop, while this process still leads."""
        await self._teller.drained()

    def _labels(self) -> Iterator[JobLabels]:
        return (labels_of(parent.status, str((parent.document["spec"] or {}).get("algorithm", ""))) for parent in self._cache.parents)

    def _told(self, resource: Resource, raw: Object) -> None:
        metadata = raw["metadata"]
        self._metrics.watch_events.labels(resource.plural).inc()
        self._freshness.told(self._watch(resource, metadata["namespace"]), int(metadata["resourceVersion"]))

    def _owes(self, resource: Resource, raw: Object) -> None:
        metadata = raw["metadata"]
        self._freshness.expect(self._watch(resource, metadata["namespace"]), int(metadata["resourceVersion"]))

    def _watch(self, resource: Resource, namespace: str) -> str:
        return f"{resource.plural} of {namespace}" if self._settings.namespaces else resource.plural

    def _changed(self, shelf: Shelf[V], view: V, deleted: bool) -> None:
        if deleted:
            shelf.remove(view)
        elif not shelf.put(view):
            return
        self._queue.add(view.key)

    async def _list(self, resource: Resource, kind: type[V], shelf: Shelf[V], labels: str, namespace: str | None) -> set[Key]:
        shelf.begin_listing()
        views, version = await self._cluster.list(resource, kind.of, namespace=namespace, labels=labels)
        changed = shelf.take(views, version, namespace=namespace)
        for view in views:
            if view.key in changed:
                self._freshness.expect(self._watch(resource, view.key.namespace), int(view.resource_version))
        return changed

    async def _resync(self) -> None:
        pause = self._settings.resync_seconds
        while True:
            # Jitter: replicas and operators of several clusters were perhaps started together.
            with suppress(TimeoutError):
                async with asyncio.timeout(pause * random.uniform(0.9, 1.1)):
                    await self._watch_began.wait()
                    # The watches of all kinds begin together, and tell what they found meanwhile.
                    await asyncio.sleep(WATCHES_BEGIN_SECONDS)
            self._watch_began.clear()
            pause = self._settings.resync_seconds
            try:
                await self.listed()
            except ApiError as error:
                pause = min(pause, LISTING_RETRY_SECONDS)
                logger.warning("the listing failed, the next one is due in %.0f s: %s", pause, error)

    async def _work(self) -> None:
        while True:
            key = await self._queue.get()
            try:
                await self._reconcile(key)
            finally:
                self._queue.done(key)

    async def _reconcile(self, key: Key) -> None:
        began, outcome = time.perf_counter(), "error"
        try:
            settled = await self._reconciler.reconcile(key)
        except FencedError:
            raise
        except ApiError as error:
            delay = self._queue.retry(key, at_least=error.retry_after)
            # A conflict means that the cache is a moment behind; the next pass sees the newer object.
            outcome = "conflict" if error.status == 409 else "refused"
            level = logging.DEBUG if error.status == 409 else logging.WARNING
            logger.log(level, "tried again in %.1f s: %s", delay, error, extra={"job": key})
        except Exception:
            # One job that nobody foresaw must not stop the others.
            delay = self._queue.retry(key)
            logger.exception("failed, tried again in %.1f s", delay, extra={"job": key})
        else:
            outcome = "done"
            self._settled(key, settled)
        finally:
            self._metrics.reconcile_seconds.labels(outcome).observe(time.perf_counter() - began)

    def _settled(self, key: Key, settled: Settle | None) -> None:
        self._queue.forget(key)
        if settled is None:
            self._queue.drop(key)
            self._puller.forget(key)
            return
        self._puller.follow(key, settled.poll)
        if settled.again_after is not None:
            self._queue.add_after(key, settled.again_after)
