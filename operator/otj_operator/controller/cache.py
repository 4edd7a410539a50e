"""What the watches told, by job: the newest view of each object, and which key a change concerns.

Events can be late (our own write came back first), doubled (a watch began anew) or missing (a deletion between two watches). So an older
version never replaces a newer one, and `take` prunes by a full listing what was deleted unseen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, Self, TypeVar

from otj_operator.plan import JobView, Key, Parent, PodView, WorkloadView


class View(Protocol):
    """What the three kinds of views have in common."""

    @property
    def key(self) -> Key: ...
    @property
    def uid(self) -> str: ...
    @property
    def resource_version(self) -> str: ...
    @classmethod
    def of(cls, raw: dict[str, Any], /) -> Self: ...


V = TypeVar("V", bound=View)


class Shelf(Generic[V]):
    """Views of one kind, by key and uid: an object and its successor of the same name may both be there for a while."""

    def __init__(self) -> None:
        self._views: dict[Key, dict[str, V]] = {}
        self._removed: set[str] = set()

    def of(self, key: Key) -> tuple[V, ...]:
        """Everything that concerns `key`."""
        return tuple(self._views.get(key, {}).values())

    def newest(self, key: Key) -> V | None:
        """The view of `key` that was changed last."""
        return max(self.of(key), key=lambda view: _version(view), default=None)

    def keys(self) -> set[Key]:
        """Every key that something concerns."""
        return set(self._views)

    def __iter__(self) -> Iterator[V]:
        return (view for views in self._views.values() for view in views.values())

    def put(self, view: V) -> bool:
        """Keep `view`, unless a version as new is there or the object is gone; says whether it was kept."""
        if view.uid in self._removed:
            return False  # the answer to a write that the deletion has overtaken
        present = self._views.get(view.key, {}).get(view.uid)
        if present is not None and _version(present) >= _version(view):
            return False
        self._views.setdefault(view.key, {})[view.uid] = view
        return True

    def remove(self, view: V) -> None:
        """Forget the object with the uid of `view`."""
        self._removed.add(view.uid)
        self._drop(view.key, view.uid)

    def begin_listing(self) -> None:
        """A listing starts now: objects removed from here on may still be in it."""
        self._removed.clear()

    def take(self, views: Iterable[V], version: str, *, namespace: str | None = None) -> set[Key]:
        """Take in a whole listing of `namespace` (None: of all) made at `version`; returns the keys for which something changed."""
        views = [view for view in views if view.uid not in self._removed]
        changed = {view.key for view in views if self.put(view)}
        listed = {view.uid for view in views}
        # What is newer than the listing was made after it.
        seen = (view for view in self if namespace in (None, view.key.namespace))
        stale = [view for view in seen if view.uid not in listed and _version(view) <= int(version)]
        for view in stale:
            self._drop(view.key, view.uid)
        return changed | {view.key for view in stale}

    def _drop(self, key: Key, uid: str) -> None:
        views = self._views.get(key, {})
        views.pop(uid, None)
        if not views:
            self._views.pop(key, None)


class Cache:
    """All jobs with their Jobs and pods."""

    def __init__(self) -> None:
        self.parents: Shelf[Parent] = Shelf()
        self.jobs: Shelf[JobView] = Shelf()
        self.pods: Shelf[PodView] = Shelf()
        self.workloads: Shelf[WorkloadView] = Shelf()
        self._gone: dict[Key, JobView] = {}

    def remove_job(self, view: JobView) -> None:
        """A Job is gone, and remembered until `forget_gone`.

        ttlSecondsAfterFinished may remove one before anybody has read its end; and who is not yet known to have had a Job, nor to be
        gone itself, would be given a second one.
        """
        self.jobs.remove(view)
        self._gone[view.key] = view

    def job_of(self, parent: Parent) -> JobView | None:
        """The Job of `parent`, or its end if it is gone, or else whatever Job has the name."""
        gone = self._gone.get(parent.key)
        candidates = (*self.jobs.of(parent.key), *([gone] if gone is not None and gone.ended else []))
        return next((job for job in candidates if _owns(parent, job)), None) or self.jobs.newest(parent.key)

    def bereft(self, parent: Parent) -> bool:
        """Whether `parent` had a Job that is gone."""
        gone = self._gone.get(parent.key)
        return gone is not None and _owns(parent, gone)

    def workload_of(self, job: JobView | None) -> WorkloadView | None:
        """What Kueue keeps about `job`."""
        if job is None:
            return None
        return next((workload for workload in self.workloads.of(job.key) if workload.job_uid == job.uid), None)

    def unborn(self, key: Key) -> bool:
        """Whether a job waits for its Job to be created."""
        return not self.jobs.of(key) and any(not parent.status for parent in self.parents.of(key))

    def forget_gone(self, key: Key) -> None:
        """The end of the Job of `key` is written down, or nobody asks for it any more."""
        self._gone.pop(key, None)


def _owns(parent: Parent, job: JobView) -> bool:
    return job.owner is not None and job.owner.uid == parent.uid


def _version(view: View) -> int:
    return int(view.resource_version)
