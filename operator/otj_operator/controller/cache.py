"""What the watches told, by job: the newest view of each object, and which key a change concerns.

Events can be late (our own write came back first), doubled (a watch began anew) or missing (a deletion between two watches). So an older
version never replaces a newer one, nor an object its successor of the same name; `take` prunes by a full listing what was deleted
unseen, and what is older than that listing does not come back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    """Views of one kind, by key and uid.

    `unique`: a key is a name, so that no two of its objects exist at the same time, whereas many pods carry one job's label. `gone` is told
    of each object that leaves, with the last that is known of it.
    """

    def __init__(self, *, unique: bool = False, gone: Callable[[V], None] = lambda view: None) -> None:
        self._unique, self._gone = unique, gone
        self._views: dict[Key, dict[str, V]] = {}
        self._removed: dict[str, tuple[str, int]] = {}
        """Of what was removed, by uid: its namespace, and up to which version views of it are late."""
        self._removed_before: tuple[str, ...] = ()
        self._listed: dict[str | None, int] = {}

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
        unknown = view.uid not in self._views.get(view.key, {})
        if unknown and _version(view) <= max(self._listed.get(None, 0), self._listed.get(view.key.namespace, 0)):
            return False  # a listing as new did not have it
        return self._keep(view)

    def remove(self, view: V) -> None:
        """Forget the object with the uid of `view`, and what is told of it later but is no newer."""
        self._remove(view, _version(view))

    def begin_listing(self) -> None:
        """A listing starts now: objects removed from here on may still be in it."""
        self._removed_before = tuple(self._removed)

    def take(self, views: Iterable[V], version: str, *, namespace: str | None = None) -> set[Key]:
        """Take in a whole listing of `namespace` (None: of all) made at `version`; returns the keys for which something changed."""
        for uid in self._removed_before:
            if namespace in (None, self._removed[uid][0]):
                del self._removed[uid]  # from now on the listing itself tells what is gone
        self._removed_before = ()
        views = list(views)
        changed = {view.key for view in views if self._keep(view)}
        listed = {view.uid for view in views}
        # What is newer than the listing was made after it.
        seen = (view for view in self if namespace in (None, view.key.namespace))
        stale = [view for view in seen if view.uid not in listed and _version(view) <= int(version)]
        for view in stale:
            self._drop(view)
        self._listed[namespace] = int(version)
        return changed | {view.key for view in stale}

    def _keep(self, view: V) -> bool:
        version = _version(view)
        if version <= self._removed.get(view.uid, ("", 0))[1]:
            return False  # the answer to a write that the deletion has overtaken
        present = self._views.get(view.key, {}).get(view.uid)
        if present is not None and _version(present) >= version:
            return False
        if self._unique:
            # Versions of one kind are in one order, and a name is free only after a deletion: all of the older object's are the lower ones.
            for other in self.of(view.key):
                if other.uid != view.uid and _version(other) > version:
                    self._remove(view, _version(other))
                    return False
                if other.uid != view.uid:
                    self._remove(other, version)
        self._views.setdefault(view.key, {})[view.uid] = view
        return True

    def _remove(self, view: V, until: int) -> None:
        self._removed[view.uid] = (view.key.namespace, until)
        self._drop(view)

    def _drop(self, view: V) -> None:
        views = self._views.get(view.key, {})
        views.pop(view.uid, None)
        if not views:
            self._views.pop(view.key, None)
        self._gone(view)


class Cache:
    """All jobs with their Jobs and pods."""

    def __init__(self) -> None:
        self.parents: Shelf[Parent] = Shelf(unique=True)
        self.jobs: Shelf[JobView] = Shelf(unique=True, gone=self._remember)
        self.pods: Shelf[PodView] = Shelf()
        self.workloads: Shelf[WorkloadView] = Shelf()
        self._gone: dict[Key, dict[str, JobView]] = {}
        """Jobs that are gone, by key and the uid of whom they belonged to."""

    def job_of(self, parent: Parent) -> JobView | None:
        """The Job of `parent`, or its end if it is gone, or else whatever Job has the name."""
        present = self.jobs.newest(parent.key)
        gone = self._gone.get(parent.key, {}).get(parent.uid)
        ours = present is not None and present.owner is not None and present.owner.uid == parent.uid
        return gone if gone is not None and gone.ended and not ours else present

    def bereft(self, parent: Parent) -> bool:
        """Whether `parent` had a Job that is gone."""
        return parent.uid in self._gone.get(parent.key, {})

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

    def _remember(self, job: JobView) -> None:
        """A Job is gone, and remembered until `forget_gone`.

        ttlSecondsAfterFinished may remove one before anybody has read its end; and who is not yet known to have had a Job, nor to be
        gone itself, would be given a second one. A namesake's Job, which may be gone as well by then, must not hide that.
        """
        if job.owner is not None:
            self._gone.setdefault(job.key, {})[job.owner.uid] = job


def _version(view: View) -> int:
    return int(view.resource_version)
