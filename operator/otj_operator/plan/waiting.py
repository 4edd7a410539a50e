"""Explain: what a pod that does not train waits for, as one reason and one sentence.

The pod itself says most. What only Events tell (no pod can be made, a volume cannot be mounted) is asked for, but not at once and
ever more seldom: most pods start within seconds, and the few that wait for hours must not cost a call every few seconds each.
"""

from __future__ import annotations

from datetime import datetime

from otj_operator.plan.children import JobView
from otj_operator.plan.draft import Draft
from otj_operator.plan.observed import Observed, Told
from otj_operator.plan.pods import ContainerView, PodView
from otj_runtime.api import ConditionType, Reason
from otj_runtime.pod.manifest import job_labels

FIRST_ASK_SECONDS = 10.0
ASK_SECONDS = 30.0
LOST_SECONDS = 60.0
"""Beyond a pod's grace period; then its kubelet is gone."""

JOB_NAME_LABEL = "batch.kubernetes.io/job-name"
"""Kubernetes' own, on each pod of a Job."""

_IMAGE = frozenset({"ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "ImageInspectError", "InvalidImageName"})
_REFUSED = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff"})
_VOLUME = frozenset({"FailedMount", "FailedAttachVolume", "FailedMapVolume"})


def waiting_for(job: JobView, pod: PodView | None, told: Told | None) -> tuple[Reason, str]:
    """Why the trainer container does not run yet, as far as can be seen."""
    if pod is None:
        return _no_pod(job, told)
    if pod.unschedulable:
        reason = Reason.VOLUME_NOT_READY if "persistentvolumeclaim" in pod.unschedulable.lower() else Reason.UNSCHEDULABLE
        return reason, f"No node takes the pod: {pod.unschedulable}"
    for container in (pod.model, pod.generator, pod.trainer):
        if container.state == "waiting" and container.reason in _IMAGE | _REFUSED:
            reason = Reason.IMAGE_PULL_FAILED if container.reason in _IMAGE else Reason.CONTAINER_REFUSED
            return reason, f"Container {container.name}: {container.reason}: {container.message or 'see its events'}"
    if pod.model.state == "running":
        return Reason.POD_PENDING, "The model container fetches or checks the model."
    if not pod.model.state:
        return Reason.POD_PENDING, "The pod waits for a node."
    if told is not None and told.uid == pod.uid and told.message:
        reason = Reason.VOLUME_NOT_READY if told.reason in _VOLUME else Reason.CONTAINER_REFUSED
        return reason, f"{told.reason}: {told.message}"
    return Reason.POD_PENDING, "The containers are being started: images are pulled and volumes mounted."


def _no_pod(job: JobView, told: Told | None) -> tuple[Reason, str]:
    if job.pods_active:
        # The Job controller knows its pods by a label of its own, we by ours, so that it would not make another one.
        label = f"`kubectl label pods -n {job.key.namespace} -l {JOB_NAME_LABEL}={job.key.name} {_labels(job)}`"
        return (
            Reason.POD_PENDING,
            f"The Job's pod is not seen: it is just being replaced, or somebody took its labels, which {label} puts back.",
        )
    if told is not None and told.message:
        return Reason.POD_REFUSED, f"Kubernetes refuses to make the pod: {told.message}"
    return Reason.POD_PENDING, "The Job has no pod yet; if this lasts, `kubectl describe job` says why."


def _labels(job: JobView) -> str:
    return " ".join(f"{name}={value}" for name, value in job_labels(job.key.name).items())


def awaited_asks(draft: Draft, observed: Observed, job: JobView, pod: PodView | None, now: datetime) -> str | None:
    """The uid of the object whose Events should be asked for now; else sees to it that the question comes up again."""
    uid = _unexplained(job, pod)
    running = draft.before(ConditionType.RUNNING)
    if uid is None or running is None:
        if uid is not None:
            draft.wake(FIRST_ASK_SECONDS)
        return None
    waited = (now - datetime.fromisoformat(running.last_transition_time)).total_seconds()
    told = observed.told if observed.told is not None and observed.told.uid == uid else None
    due = FIRST_ASK_SECONDS - waited if told is None else max(ASK_SECONDS, waited / 4) - (now - told.at).total_seconds()
    if due > 0:
        draft.wake(due)
        return None
    return uid


def lost_node(draft: Draft, pod: PodView, now: datetime) -> tuple[Reason, str] | None:
    """What to say of a pod that should have ended long ago; None while it is still in time."""
    late = (now - datetime.fromisoformat(pod.due)).total_seconds() - LOST_SECONDS
    if late < 0:
        draft.wake(-late)
        return None
    message = f"Pod {pod.name} should have ended by {pod.due}, its node does not answer: {Reason.NODE_LOST.advice}"
    return Reason.NODE_LOST, message


def generator_state(generator: ContainerView) -> tuple[Reason, str]:
    """Why the generator does not answer yet."""
    if generator.restarts:
        message = f"vLLM was started again ({generator.restarts} restarts); it ended before with: {generator.previous_end or 'no word'}"
        return Reason.GENERATOR_RESTARTED, message
    started = generator.state == "running"
    return Reason.GENERATOR_STARTING, "vLLM is starting." if started else "vLLM has not been started yet."


def _unexplained(job: JobView, pod: PodView | None) -> str | None:
    """What the Events should be about; None if the pod itself says what it waits for."""
    if pod is None:
        return job.uid
    on_a_node = bool(pod.model.state) and pod.model.state == "waiting"
    return pod.uid if on_a_node and waiting_for(job, pod, None)[0] is Reason.POD_PENDING else None
