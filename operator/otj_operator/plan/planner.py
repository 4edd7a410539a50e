"""From what is observed of one job to the next step: look, ask, create, patch, or settle with a status.

    nothing yet      -> Create -> the answer decides: follow it, or say why it was refused
    our Job          -> follow: its end decides first, then suspension, then what its newest pod does
    our Job is gone  -> Look (the cache may lag) -> lost, once its pods are gone too

Rules kept here and below: terminal is terminal; a Job is created once and its template is never touched; it is resumed only by whom
it was suspended; a Job of somebody else is never ours; the job is over only when its Job says so, because only then its GPUs are free.
"""

from __future__ import annotations

from datetime import datetime

from otj_operator.plan.children import JobView
from otj_operator.plan.draft import Draft, finished, timestamp
from otj_operator.plan.events import transitions
from otj_operator.plan.follow import follow
from otj_operator.plan.observed import Observed, Refusal, RefusalKind
from otj_operator.plan.parent import Parent
from otj_operator.plan.steps import Create, Look, PollTarget, Settle, Step
from otj_runtime.api import KIND, ConditionType, InvalidJobError, Reason, parse_job
from otj_runtime.pod.manifest import build_job

WRITE_SECONDS = 5.0
"""A status in which no condition changed is written at most this often."""

PREDECESSOR_SECONDS = 2.0
FORBIDDEN_SECONDS = 30.0


def plan(observed: Observed, *, now: datetime, image: str) -> Step:
    """The next step for a job; `image` is the runtime image of jobs that name none."""
    parent = observed.parent
    if finished(parent.status) or not parent.ours:
        return Settle()
    draft = Draft(parent, now)
    if parent.deleting:
        return _deleting(draft, observed, now)
    job = observed.job
    if job is not None and belongs(job, parent):
        found = follow(draft, observed, job, now)
        return found if not isinstance(found, PollTarget | None) else settle(draft, observed, now, poll=found)
    created = draft.before(ConditionType.CREATED)
    if observed.bereft or (created is not None and created.status == "True"):
        return _lost(draft, observed, now)
    if observed.refusal is not None:
        return _refused(draft, observed, observed.refusal, now)
    if job is not None:
        return _refused(draft, observed, taken(job, parent), now)
    if parent.paused and parent.queue:
        return _unqueued(draft, observed, now)
    return _create(draft, observed, image, now)


def belongs(job: JobView, parent: Parent) -> bool:
    """Whether `job` is the one of `parent`: by its owner, or, if somebody has cut the owner off, by its remembered identity."""
    return job.owner.uid == parent.uid if job.owner is not None else job.uid == parent.status.get("jobUid")


def taken(job: JobView, parent: Parent) -> Refusal:
    """Why `parent` cannot have a Job while `job`, which is not its own, has the name."""
    owner = job.owner
    predecessor = owner is not None and (owner.kind, owner.name) == (KIND, parent.key.name)
    if predecessor or job.deleting:
        return Refusal(kind=RefusalKind.PREDECESSOR, message=f"Waiting until the Job {job.key} of an earlier run is gone.")
    whose = f"belongs to {owner.kind} {owner.name}" if owner else "belongs to nobody that Kubernetes knows"
    return Refusal(
        kind=RefusalKind.TAKEN, message=f"The Job {job.key} exists and {whose}; it is left alone. Give one of the two another name."
    )


def settle(draft: Draft, observed: Observed, now: datetime, *, poll: PollTarget | None = None) -> Settle:
    """The draft as a step: nothing to write if it says nothing new, later if no condition is new and a write was a moment ago."""
    before, after = observed.parent.status, draft.to_wire()
    if after == before:
        return Settle(poll=poll, again_after=draft.again_after)
    if observed.written_at is not None and _conditions(after) == _conditions(before):
        wait = WRITE_SECONDS - (now - observed.written_at).total_seconds()
        if wait > 0:
            draft.wake(wait)
            return Settle(poll=poll, again_after=draft.again_after)
    return Settle(status=after, events=transitions(before, after, time=timestamp(now)), poll=poll, again_after=draft.again_after)


def _conditions(status: dict[str, object]) -> object:
    """What must not wait: which conditions are true, and why."""
    conditions: list[dict[str, object]] = status.get("conditions", [])  # type: ignore[assignment]
    return [(c["type"], c["status"], c["reason"]) for c in conditions]


def _deleting(draft: Draft, observed: Observed, now: datetime) -> Settle:
    """Kubernetes removes the Job and its pod; while they last, nobody should read that the run runs."""
    if draft.before(ConditionType.RUNNING) is None:
        return Settle()
    draft.rest(Reason.DELETING)
    return settle(draft, observed, now)


def _create(draft: Draft, observed: Observed, image: str, now: datetime) -> Step:
    try:
        return Create(build_job(parse_job(observed.parent.document), default_image=image))
    except InvalidJobError as error:
        draft.say(ConditionType.CREATED, False, Reason.INVALID_SPEC, str(error))
        draft.end(ConditionType.FAILED, Reason.INVALID_SPEC, str(error))
        return settle(draft, observed, now)


def _unqueued(draft: Draft, observed: Observed, now: datetime) -> Settle:
    """Kueue resumes every suspended Job that it admits, so a Job that must not run yet must not be queued yet."""
    message = f"The Job is made, and queued in {observed.parent.queue}, when spec.suspend is set to false."
    draft.say(ConditionType.CREATED, False, Reason.JOB_SUSPENDED, message)
    draft.rest(Reason.JOB_SUSPENDED, message)
    draft.say(ConditionType.SUSPENDED, True, Reason.JOB_SUSPENDED, message)
    return settle(draft, observed, now)


def _refused(draft: Draft, observed: Observed, refusal: Refusal, now: datetime) -> Step:
    conflict = refusal.kind in (RefusalKind.TAKEN, RefusalKind.PREDECESSOR)
    reason = Reason.JOB_CONFLICT if conflict else Reason.JOB_REJECTED
    draft.say(ConditionType.CREATED, False, reason, refusal.message)
    if refusal.kind is RefusalKind.PREDECESSOR:
        draft.wake(PREDECESSOR_SECONDS)
    elif refusal.kind is RefusalKind.FORBIDDEN:
        draft.wake(FORBIDDEN_SECONDS)
    else:
        draft.end(ConditionType.FAILED, reason, refusal.message)
    return settle(draft, observed, now)


def _lost(draft: Draft, observed: Observed, now: datetime) -> Step:
    if observed.job is None and not observed.absence_confirmed:
        return Look()
    if any(pod.live for pod in observed.pods):
        draft.rest(Reason.JOB_LOST, "The Job was deleted; its pod is ending and still holds its GPUs.")
        return settle(draft, observed, now)
    message = f"The Job {observed.parent.key} was deleted while the run was going; to run it anew, delete this {KIND} and apply it again."
    if observed.parent.spec.get("ttlSecondsAfterFinished") is not None:
        message += " Or it ended while no operator ran, and ttlSecondsAfterFinished removed it unseen: the output tells."
    draft.end(ConditionType.FAILED, Reason.JOB_LOST, message)
    return settle(draft, observed, now)
