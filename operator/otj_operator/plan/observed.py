"""Everything that one decision is made from: the views of all objects, what others told, and what the API server refused."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from otj_operator.plan.children import JobView, WorkloadView
from otj_operator.plan.parent import Parent
from otj_operator.plan.pods import PodView
from otj_runtime.pod.metrics import LauncherReport

Object = dict[str, Any]


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

    `job` None means that the cache has none; `bereft` that it had one, which was deleted; `absence_confirmed` that the API server has none
    either. `silent_since` is when the launcher's silence began, if it lasts too long. `written_at` is when this process last wrote the status.
    """

    parent: Parent
    job: JobView | None = None
    bereft: bool = False
    absence_confirmed: bool = False
    pods: tuple[PodView, ...] = ()
    report: Report | None = None
    silent_since: datetime | None = None
    refusal: Refusal | None = None
    workload: WorkloadView | None = None
    told: Told | None = None
    written_at: datetime | None = None
