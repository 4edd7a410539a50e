"""From what is observed of one job to the next step: look, create, or settle with a status.

    nothing yet      -> Create -> the answer decides: follow it, or say why it was refused
    our Job          -> its end decides first, then suspension, then what its newest pod does
    our Job is gone  -> Look (the cache may lag) -> lost, once its pods are gone too

Rules kept here: terminal is terminal; a Job is created once and never touched again; a Job of somebody else is never ours; the job
is over only when its Job says so, because only then its GPUs are free.
"""

from __future__ import annotations

from datetime import datetime

from otj_operator.plan.causes import job_cause, pod_cause
from otj_operator.plan.draft import Draft, finished, timestamp
from otj_operator.plan.events import transitions
from otj_operator.plan.observed import JobView, Observed, Parent, PodView, Refusal, RefusalKind
from otj_operator.plan.progress import at_the_end, merged
from otj_operator.plan.steps import Create, Look, PollTarget, Settle, Step
from otj_operator.plan.waiting import generator_state, waiting_for
from otj_runtime.api import KIND, ConditionType, InvalidJobError, Reason, parse_job
from otj_runtime.pod.manifest import build_job
from otj_runtime.pod.names import PROGRESS_ROUTE

WRITE_SECONDS = 5.0
"""A status in which only progress changed is written at most this often."""

PREDECESSOR_SECONDS = 2.0
FORBIDDEN_SECONDS = 30.0


def plan(observed: Observed, *, now: datetime, image: str) -> Step:
    """The next step for a job; `image` is the runtime image of jobs that name none."""
    parent = observed.parent
    if parent.deleting or finished(parent.status):
        return Settle()
    draft = Draft(parent, now)
    job = observed.job
    if job is not None and job.owner is not None and job.owner.uid == parent.uid:
        return _follow(draft, observed, job, now)
    if observed.refusal is not None:
        return _refused(draft, observed, observed.refusal, now)
    created = draft.before(ConditionType.CREATED)
    if created is not None and created.status == "True":
        return _lost(draft, observed, now)
    if job is not None:
        return _refused(draft, observed, taken(job, parent), now)
    return _create(draft, observed, image, now)


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


def _create(draft: Draft, observed: Observed, image: str, now: datetime) -> Step:
    try:
        return Create(build_job(parse_job(observed.parent.document), default_image=image))
    except InvalidJobError as error:
        draft.say(ConditionType.CREATED, False, Reason.INVALID_SPEC, str(error))
        draft.end(ConditionType.FAILED, Reason.INVALID_SPEC, str(error))
        return _settle(draft, observed, now)


def _refused(draft: Draft, observed: Observed, refusal: Refusal, now: datetime) -> Step:
    conflict = refusal.kind in (RefusalKind.TAKEN, RefusalKind.PREDECESSOR)
    reason = Reason.JOB_CONFLICT if conflict else Reason.JOB_REJECTED
    draft.say(ConditionType.CREATED, False, reason, refusal.message)
    if refusal.kind is RefusalKind.PREDECESSOR:
        return _settle(draft, observed, now, again_after=PREDECESSOR_SECONDS)
    if refusal.kind is RefusalKind.FORBIDDEN:
        return _settle(draft, observed, now, again_after=FORBIDDEN_SECONDS)
    draft.end(ConditionType.FAILED, reason, refusal.message)
    return _settle(draft, observed, now)


def _lost(draft: Draft, observed: Observed, now: datetime) -> Step:
    if observed.job is None and not observed.absence_confirmed:
        return Look()
    if any(pod.live for pod in observed.pods):
        draft.say(ConditionType.RUNNING, False, Reason.JOB_LOST, "The Job was deleted; its pod is ending and still holds its GPUs.")
        return _settle(draft, observed, now)
    message = f"The Job {observed.parent.key} was deleted while the run was going; to run it anew, delete this {KIND} and apply it again."
    if (observed.parent.document["spec"] or {}).get("ttlSecondsAfterFinished") is not None:
        message += " Or it ended while no operator ran, and ttlSecondsAfterFinished removed it unseen: the output tells."
    draft.end(ConditionType.FAILED, Reason.JOB_LOST, message)
    return _settle(draft, observed, now)


def _follow(draft: Draft, observed: Observed, job: JobView, now: datetime) -> Settle:
    pods = sorted((pod for pod in observed.pods if pod.job_uid == job.uid), key=lambda pod: (pod.created, pod.name))
    newest = pods[-1] if pods else None
    draft.say(ConditionType.CREATED, True, Reason.JOB_CREATED)
    draft.job_name = job.key.name
    draft.restarts = max(draft.restarts or 0, job.pods_made - 1)
    if newest is not None and observed.report is not None and observed.report.pod_uid == newest.uid:
        draft.progress = merged(draft.progress, observed.report.body.progress)
    poll = None
    if job.completed is not None:
        draft.progress = at_the_end(draft.progress, newest)
        draft.end(ConditionType.SUCCEEDED, Reason.FINISHED, "", time=job.completed.time)
    elif job.failed is not None:
        cause = job_cause(job.failed, pods)
        draft.end(ConditionType.FAILED, cause.reason, cause.message, time=job.failed.time)
    else:
        poll = _going(draft, observed, job, newest)
    return _settle(draft, observed, now, poll=poll)


def _going(draft: Draft, observed: Observed, job: JobView, pod: PodView | None) -> PollTarget | None:
    """Say what a Job that has not ended does; returns the launcher to pull from, if one runs."""
    live = pod is not None and pod.live
    if job.failing is not None:
        cause = job_cause(job.failing, [pod] if pod else [])
        _say_both(draft, cause.reason, f"{cause.message}; the Job is ending its pod.")
    elif job.suspended:
        held = "; its pod is ending and still holds its GPUs" if live else ""
        _say_both(draft, Reason.JOB_SUSPENDED, f"The Job is suspended{held}.")
    elif pod is None:
        _say_both(draft, Reason.POD_PENDING, "The Job has no pod yet; if this lasts, `kubectl describe job` says why.")
    elif not live or pod.trainer.state == "terminated" or pod.model.exit_code:
        _say_pod_ended(draft, pod)
    elif pod.deleting:
        _say_both(draft, Reason.TERMINATED, "The pod is being ended: drained, preempted or deleted; the trainer saves a checkpoint.")
    elif pod.trainer.state == "running":
        _say_running(draft, observed, pod)
        return _target(pod)
    else:
        draft.say(ConditionType.RUNNING, False, Reason.POD_PENDING, waiting_for(pod))
        _say_generator(draft, pod)
    return None


def _say_both(draft: Draft, reason: Reason, message: str) -> None:
    draft.say(ConditionType.GENERATOR_READY, False, reason, message)
    draft.say(ConditionType.RUNNING, False, reason, message)


def _say_pod_ended(draft: Draft, pod: PodView) -> None:
    """The Job has not drawn its conclusion yet."""
    cause = pod_cause(pod)
    if cause is None:
        _say_both(draft, Reason.FINISHED, "All steps were made; the pod is ending.")
    elif cause.permanent:
        _say_both(draft, cause.reason, cause.message)
    else:
        _say_both(draft, Reason.RETRYING, f"Pod {pod.name} failed with {cause.reason}: {cause.message}")


def _say_running(draft: Draft, observed: Observed, pod: PodView) -> None:
    _say_generator(draft, pod)
    report = observed.report if observed.report is not None and observed.report.pod_uid == pod.uid else None
    before = draft.before(ConditionType.RUNNING)
    same_pod = draft.start_time == pod.start_time
    draft.start_time = pod.start_time
    if report is None and same_pod and before is not None and before.status == "True":
        # This process has not asked the launcher yet, an earlier one has: its words stand.
        draft.keep(ConditionType.RUNNING)
    elif report is None:
        draft.say(ConditionType.RUNNING, True, Reason.STARTING, "The trainer container runs; its launcher has not answered yet.")
    elif report.body.phase == "starting":
        draft.say(ConditionType.RUNNING, True, Reason.STARTING)
    else:
        draft.say(ConditionType.RUNNING, True, Reason.TRAINING)


def _say_generator(draft: Draft, pod: PodView) -> None:
    if pod.generator.ready:
        draft.say(ConditionType.GENERATOR_READY, True, Reason.GENERATOR_SERVING)
    else:
        draft.say(ConditionType.GENERATOR_READY, False, Reason.GENERATOR_STARTING, generator_state(pod.generator))


def _target(pod: PodView) -> PollTarget | None:
    if not pod.ip or pod.progress_port is None:
        return None
    host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
    return PollTarget(pod_uid=pod.uid, url=f"http://{host}:{pod.progress_port}{PROGRESS_ROUTE}")


def _settle(draft: Draft, observed: Observed, now: datetime, *, poll: PollTarget | None = None, again_after: float | None = None) -> Settle:
    """The draft as a step: nothing to write if it says nothing new, later if only progress is new and was written a moment ago."""
    before, after = observed.parent.status, draft.to_wire()
    if after == before:
        return Settle(poll=poll, again_after=again_after)
    if observed.written_at is not None and _but_progress(after) == _but_progress(before):
        wait = WRITE_SECONDS - (now - observed.written_at).total_seconds()
        if wait > 0:
            return Settle(poll=poll, again_after=wait)
    return Settle(status=after, events=transitions(before, after, time=timestamp(now)), poll=poll, again_after=again_after)


def _but_progress(status: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in status.items() if key != "progress"}
