"""Kubernetes Events for transitions: what `kubectl describe` shows as the job's story.

An event's name is made from what it tells and the ten minutes in which it does, so that an operator that is started again, or writes
twice, or watches something flap, tells nothing twice: the API server refuses the second one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from otj_runtime.api import ConditionType, Reason

Object = dict[str, Any]

_MESSAGE_LIMIT = 1024
_NORMAL = frozenset(
    {
        *(
            Reason.JOB_CREATED,
            Reason.JOB_SUSPENDED,
            Reason.SUSPENDING,
            Reason.NOT_SUSPENDED,
            Reason.WAITING_FOR_QUEUE,
            Reason.GENERATOR_SERVING,
        ),
        *(Reason.TRAINING, Reason.STARTING, Reason.FINISHED, Reason.CHECKPOINT_SAVED),
    }
)
_UNTOLD = frozenset(
    {
        *(Reason.POD_PENDING, Reason.GENERATOR_STARTING, Reason.NO_SYNC_YET, Reason.WEIGHTS_PROVEN, Reason.NO_CHECKPOINT_YET),
        *(Reason.CHECKPOINT_SAVED, Reason.OUTPUT_NOT_KEPT, Reason.DELETING),
    }
)
"""States that every job passes, or that are no news: scheduler and kubelet tell of the first."""

_SAME_STORY_CHARACTERS = len("2026-01-01T12:0")
"""The same words within ten minutes are one Event: a generator that flaps must not fill the namespace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened to a job."""

    type: str
    reason: str
    message: str
    time: str


def transitions(before: Object, after: Object, *, time: str) -> tuple[Event, ...]:
    """The events of the step from status `before` to status `after`."""
    old = {c["type"]: (c["status"], c["reason"]) for c in before.get("conditions", [])}
    changed = [c for c in after.get("conditions", []) if old.get(c["type"]) != (c["status"], c["reason"])]
    ends = [c for c in changed if c["type"] in (ConditionType.SUCCEEDED, ConditionType.FAILED)]
    # At the end of a job every condition changes for the same reason, some a moment before the end itself: tell the end, once.
    ending = after.get("state") == "Ending"
    told = ends or [c for c in changed if _news(c, old, ending=ending)]
    by_reason = {c["reason"]: c for c in told}
    return tuple(
        Event(type="Normal" if reason in _NORMAL else "Warning", reason=reason, message=c["message"][:_MESSAGE_LIMIT], time=time)
        for reason, c in by_reason.items()
    )


def _news(condition: Object, old: dict[str, tuple[str, str]], *, ending: bool) -> bool:
    kind, reason = condition["type"], condition["reason"]
    if kind == ConditionType.QUOTA_RESERVED:
        return False  # Kueue tells that itself, of the Workload
    if reason in _UNTOLD or (ending and reason != Reason.TERMINATED):
        return False
    return reason != Reason.NOT_SUSPENDED or old.get(kind, ("False",))[0] == "True"


def event_object(event: Event, *, involved: Object, component: str) -> Object:
    """The core/v1 Event about the object that `involved` refers to."""
    told = "\0".join((involved["uid"], event.type, event.reason, event.message, event.time[:_SAME_STORY_CHARACTERS]))
    digest = hashlib.sha256(told.encode()).hexdigest()[:16]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"namespace": involved["namespace"], "name": f"{involved['name']}.{digest}"},
        "involvedObject": involved,
        "type": event.type,
        "reason": event.reason,
        "message": event.message,
        "firstTimestamp": event.time,
        "lastTimestamp": event.time,
        "count": 1,
        "source": {"component": component},
        "reportingComponent": component,
    }
