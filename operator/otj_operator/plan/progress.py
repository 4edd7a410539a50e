"""`status.progress` from what the launcher tells. It never goes back to nothing: the last known progress outlives the pod."""

from __future__ import annotations

from pydantic import ValidationError

from otj_operator.plan.observed import PodView
from otj_runtime.api import Progress
from otj_runtime.pod.metrics import LauncherReport


def merged(before: Progress | None, told: Progress | None) -> Progress | None:
    """`before` with every field that `told` has."""
    if told is None:
        return before
    values = (before.model_dump(exclude_none=True) if before else {}) | told.model_dump(exclude_none=True)
    return _with_steps(Progress.model_validate(values))


def at_the_end(before: Progress | None, pod: PodView | None) -> Progress | None:
    """The progress of a job that succeeded: the launcher's last words if it left any, and all steps made."""
    last = _last_words(pod) if pod else None
    progress = merged(before, last)
    if progress is None:
        return None
    total = progress.total_steps
    done = {"step": total} if total is not None else {}
    return _with_steps(progress.model_copy(update={**done, "remaining_seconds": 0}))


def _with_steps(progress: Progress) -> Progress:
    if progress.step is None:
        return progress
    total = f"/{progress.total_steps}" if progress.total_steps is not None else ""
    return progress.model_copy(update={"steps": f"{progress.step}{total}"})


def _last_words(pod: PodView) -> Progress | None:
    """The report that a launcher may leave as its termination message when it succeeds."""
    try:
        return LauncherReport.model_validate_json(pod.trainer.message).progress
    except ValidationError:
        return None
