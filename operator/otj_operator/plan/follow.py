"""What a Job of ours does, said as conditions. Its end decides first, then suspension, then what its newest pod does."""

from __future__ import annotations

from datetime import datetime

from otj_operator.plan.adjust import adjustment, queued
from otj_operator.plan.causes import job_cause, pod_cause
from otj_operator.plan.children import JobView
from otj_operator.plan.draft import Draft
from otj_operator.plan.observed import Observed
from otj_operator.plan.pods import PodView
from otj_operator.plan.progress import at_the_end, last_words, merged
from otj_operator.plan.signs import say_checkpoint, say_running
from otj_operator.plan.steps import Ask, Patch, PollTarget
from otj_operator.plan.waiting import awaited_asks, generator_state, lost_node, waiting_for
from otj_runtime.api import ConditionType, Reason
from otj_runtime.pod.names import PROGRESS_ROUTE

REFUSED_SECONDS = 30.0
"""After a change of the Job was refused; the quota or right that it lacked may have come."""


def follow(draft: Draft, observed: Observed, job: JobView, now: datetime) -> Patch | Ask | PollTarget | None:
    """Say in `draft` what `job` does. Returns what must be done first, or else the launcher to pull from, if one runs."""
    patch = adjustment(observed, job)
    if patch is not None:
        return patch
    pods = sorted((pod for pod in observed.pods if pod.job_uid == job.uid), key=lambda pod: (pod.created, pod.name))
    newest = pods[-1] if pods else None
    _say_created(draft, observed, job)
    _count_restarts(draft, job, newest)
    _take_progress(draft, observed, newest)
    if job.completed is not None:
        draft.progress = at_the_end(draft.progress)
        draft.end(ConditionType.SUCCEEDED, Reason.FINISHED, "", time=job.completed.time)
        return None
    if job.failed is not None:
        cause = job_cause(job.failed, pods)
        draft.end(ConditionType.FAILED, cause.reason, cause.message, time=job.failed.time)
        return None
    return _going(draft, observed, job, newest, now)


def _say_created(draft: Draft, observed: Observed, job: JobView) -> None:
    draft.job_name, draft.job_uid = job.key.name, job.uid
    if observed.refusal is None:
        draft.say(ConditionType.CREATED, True, Reason.JOB_CREATED)
    else:
        draft.say(ConditionType.CREATED, True, Reason.JOB_NOT_ADJUSTED, observed.refusal.message)
        draft.wake(REFUSED_SECONDS)
    if queued(observed, job):
        quota = observed.workload.quota if observed.workload is not None else None
        if quota is None:
            draft.say(ConditionType.QUOTA_RESERVED, False, Reason.WAITING_FOR_QUEUE, "Kueue has not judged the Job yet.")
        else:
            draft.quote(ConditionType.QUOTA_RESERVED, quota.status == "True", quota.reason or "Unknown", quota.message)


def _count_restarts(draft: Draft, job: JobView, newest: PodView | None) -> None:
    """A pod of another name than the one remembered has replaced it; while suspended none is remembered, so a resume is no restart."""
    replaced = newest is not None and draft.pod_name is not None and newest.name != draft.pod_name
    draft.restarts = max((draft.restarts or 0) + replaced, job.pods_made - 1)
    draft.restarts_counted = max(draft.restarts_counted or 0, min(draft.restarts, job.pods_failed))
    if newest is not None:
        draft.pod_name = newest.name


def _take_progress(draft: Draft, observed: Observed, newest: PodView | None) -> None:
    """What was pulled, then what the launcher said at its end. Whether the checkpoint is fresh follows, also once nothing runs."""
    if newest is not None:
        if observed.report is not None and observed.report.pod_uid == newest.uid:
            draft.progress = merged(draft.progress, observed.report.body.progress)
        draft.progress = merged(draft.progress, last_words(newest))
    if draft.progress is not None or (newest is not None and newest.trainer.state == "running"):
        say_checkpoint(draft, observed.parent)


def _going(draft: Draft, observed: Observed, job: JobView, pod: PodView | None, now: datetime) -> Ask | PollTarget | None:
    """Say what a Job that has not ended does."""
    draft.say(ConditionType.SUSPENDED, False, Reason.NOT_SUSPENDED)
    if job.failing is not None:
        cause = job_cause(job.failing, [pod] if pod else [])
        draft.rest(cause.reason, f"{cause.message}; the Job is ending its pod.")
        return None
    if job.suspended or observed.parent.paused:
        _say_suspended(draft, observed, job, pod, now)
        return None
    if pod is None or (pod.live and not pod.deleting and pod.trainer.state not in ("running", "terminated") and not pod.model.exit_code):
        return _say_waiting(draft, observed, job, pod, now)
    if not pod.live or pod.trainer.state == "terminated" or pod.model.exit_code:
        _say_pod_ended(draft, pod)
    elif pod.deleting:
        message = "The pod is being ended: drained, preempted or deleted; the trainer saves a checkpoint."
        draft.rest(Reason.TERMINATED, message, cause=lost_node(draft, pod, now))
    else:
        _say_generator(draft, pod)
        say_running(draft, observed, pod)
        return _target(pod)
    return None


def _say_suspended(draft: Draft, observed: Observed, job: JobView, pod: PodView | None, now: datetime) -> None:
    if pod is not None and pod.live:
        cause = lost_node(draft, pod, now) if pod.deleting else None
        draft.rest(Reason.SUSPENDING, "The pod saves a checkpoint and ends; it still holds its GPUs.", cause=cause)
        draft.say(ConditionType.SUSPENDED, False, Reason.SUSPENDING)
        return
    if not job.suspended:
        draft.rest(Reason.SUSPENDING, "The Job is about to be suspended.")
        draft.say(ConditionType.SUSPENDED, False, Reason.SUSPENDING, "The Job is about to be suspended.")
        return
    draft.pod_name = None
    reason, message = _suspension(observed, job)
    draft.rest(reason, message)
    draft.say(ConditionType.SUSPENDED, True, reason, message)


def _suspension(observed: Observed, job: JobView) -> tuple[Reason, str]:
    """Why a suspended Job is suspended."""
    if observed.parent.paused or job.suspended_by_us:
        return Reason.JOB_SUSPENDED, ""
    if not queued(observed, job):
        return Reason.SUSPENDED_ELSEWHERE, ""
    workload = observed.workload
    if workload is not None and not workload.active:
        why = f"{workload.evicted.reason}: {workload.evicted.message}" if workload.evicted else "somebody set its spec.active to false"
        command = f'kubectl patch workload {workload.name} --type=merge -p \'{{"spec":{{"active":true}}}}\''
        return Reason.QUEUE_DEACTIVATED, f"The Workload {workload.name} is deactivated in Kueue ({why}); to try again: {command}"
    where = f"in the queue {job.queue}" if job.queue else "in Kueue"
    evicted = workload.evicted if workload is not None else None
    if evicted is not None:
        return Reason.WAITING_FOR_QUEUE, f"The Job was evicted and waits again {where} ({evicted.reason}): {evicted.message}"
    said = f": {workload.quota.message}" if workload is not None and workload.quota is not None else "."
    return Reason.WAITING_FOR_QUEUE, f"The Job waits {where}{said}"


def _say_waiting(draft: Draft, observed: Observed, job: JobView, pod: PodView | None, now: datetime) -> Ask | None:
    """No trainer runs yet, and nothing has ended: say what is waited for."""
    uid = awaited_asks(draft, observed, job, pod, now)
    if uid is not None:
        return Ask(uid)
    cause = waiting_for(job, pod, observed.told)
    draft.rest(Reason.POD_PENDING, cause[1], cause=cause)
    if pod is not None:
        _say_generator(draft, pod)
    return None


def _say_pod_ended(draft: Draft, pod: PodView) -> None:
    """The Job has not drawn its conclusion yet."""
    cause = pod_cause(pod)
    if cause is None:
        draft.rest(Reason.FINISHED, "All steps were made; the pod is ending.")
    elif cause.permanent:
        draft.rest(cause.reason, cause.message)
    else:
        message = f"Pod {pod.name} failed with {cause.reason}: {cause.message}"
        draft.rest(Reason.RETRYING, message, cause=(cause.reason, message))


def _say_generator(draft: Draft, pod: PodView) -> None:
    if pod.generator.ready:
        draft.say(ConditionType.GENERATOR_READY, True, Reason.GENERATOR_SERVING)
    else:
        draft.say(ConditionType.GENERATOR_READY, False, *generator_state(pod.generator))


def _target(pod: PodView) -> PollTarget | None:
    if not pod.ip or pod.progress_port is None:
        return None
    host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
    return PollTarget(pod_uid=pod.uid, url=f"http://{host}:{pod.progress_port}{PROGRESS_ROUTE}")
