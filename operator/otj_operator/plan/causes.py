"""Why a pod or a Job failed, from the nearest witness to the farthest.

the launcher's note (termination message)  >  its exit code  >  what the kubelet says of the container or pod  >  the Job controller
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from otj_operator.plan.children import JobEnd
from otj_operator.plan.pods import ContainerView, PodView
from otj_runtime.api import Reason
from otj_runtime.pod.errors import ExitCode, FailureNote


@dataclass(frozen=True, slots=True)
class Cause:
    """A reason and a sentence. `permanent`: another pod would fail the same way."""

    reason: Reason
    message: str
    permanent: bool = False


def job_cause(end: JobEnd, pods: list[PodView]) -> Cause:
    """Why a Job failed whose pods, oldest first, are `pods`."""
    if end.reason == "DeadlineExceeded":
        # The pod was ended for it, so whatever its containers say is a consequence.
        return Cause(Reason.DEADLINE_EXCEEDED, end.message or Reason.DEADLINE_EXCEEDED.advice)
    cause = next((cause for pod in reversed(pods) if (cause := pod_cause(pod)) is not None), None)
    if cause is None:
        reason = Reason.BACKOFF_LIMIT_EXCEEDED if end.reason == "BackoffLimitExceeded" else Reason.POD_FAILED
        return Cause(reason, f"{end.message or 'The Job failed'} ({end.reason}); its pods are gone or say nothing")
    if end.reason == "BackoffLimitExceeded":
        reason = Reason.BACKOFF_LIMIT_EXCEEDED if cause.reason is Reason.POD_FAILED else cause.reason
        return Cause(reason, f"{cause.message} (pod {pods[-1].name}, the last that backoffLimit allows)")
    return cause


def pod_cause(pod: PodView) -> Cause | None:
    """Why `pod` failed, or None if it did not."""
    for container in (pod.model, pod.trainer):
        if container.state == "terminated" and container.exit_code:
            return _container_cause(container)
    if pod.phase != "Failed":
        return None
    rejected = pod.reason == "UnexpectedAdmissionError" or pod.reason.startswith("OutOf")
    reason = Reason.DEVICE_PLUGIN_REJECTED if rejected else Reason.POD_FAILED
    return Cause(reason, f"pod {pod.name}: {pod.reason or 'failed'}: {pod.message or 'Kubernetes gives no message'}")


def _container_cause(container: ContainerView) -> Cause:
    note, code = _note(container.message), _exit_code(container.exit_code)
    permanent = code is not None and code.permanent
    if note is not None:
        return Cause(note.reason, note.message or note.reason.advice, permanent)
    ended = f"{container.name} ended with exit code {container.exit_code}"
    if container.reason == "OOMKilled":
        return Cause(Reason.POD_FAILED, f"{ended}: it used more memory than its limit allows (OOMKilled)")
    if code is not None:
        return Cause(code.reason, f"{ended}: {code.reason.advice}", permanent)
    details = ": ".join(part for part in (container.reason, container.message) if part and part != "Error")
    return Cause(Reason.POD_FAILED, f"{ended}: {details}" if details else f"{ended}; read its log")


def _note(message: str) -> FailureNote | None:
    try:
        return FailureNote.model_validate_json(message)
    except ValidationError:
        return None


def _exit_code(number: int | None) -> ExitCode | None:
    return ExitCode(number) if number in set(ExitCode) else None
