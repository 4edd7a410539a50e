"""What a decision can be. Looks, asks, creations and patches are answered within the same pass, which ends with a Settle."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from otj_operator.plan.events import Event
from otj_runtime.pod.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Look:
    """Ask the API server itself for the Job: the cache lacks one that was created."""


@dataclass(frozen=True, slots=True)
class Create:
    """Create this Job, and decide again with the answer."""

    job: Manifest


class Target(StrEnum):
    """What can be patched, always an object that belongs to the job."""

    JOB = "Job"
    WORKLOAD = "Workload"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """Merge `body` into the object, which carries the version that was seen, and decide again with the answer."""

    target: Target
    name: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask the API server what its Events warn of about the object with this uid, and decide again."""

    uid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PollTarget:
    """A launcher to pull progress from."""

    pod_uid: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """Nothing more to do now. `status` is the whole new status, None if the present one is right; `events` follow its write.

    `poll` is the launcher to pull from, if one runs; `again_after` seconds is when to decide again without being told.
    """

    status: dict[str, Any] | None = None
    events: tuple[Event, ...] = ()
    poll: PollTarget | None = None
    again_after: float | None = None


Step = Look | Create | Patch | Ask | Settle
