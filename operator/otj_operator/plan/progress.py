"""`status.progress` from what the launcher tells. It never goes back to nothing: the last known progress outlives the pod."""

from __future__ import annotations

from pydantic import ValidationError

from otj_operator.plan.pods import PodView
from otj_runtime.api import Progress, ToldModel


class _LastWords(ToldModel):
    """What the launcher's termination messages, that of success and that of failure, have in common."""

    progress: Progress | None = None


def last_words(pod: PodView) -> Progress | None:
    """The progress that a launcher left when it ended: what was made and saved since the last pull stands nowhere else."""
    if pod.trainer.state != "terminated":
        return None
    try:
        return _LastWords.model_validate_json(pod.trainer.message).progress
    except ValidationError:
        return None


def merged(before: Progress | None, told: Progress | None) -> Progress | None:
    """`before` with every field that `told` has; None rather than an empty one. An advice that is no longer told is no longer given."""
    if told is None or not told.model_dump(exclude_none=True):
        return before
    values = (before.model_dump(exclude_none=True) if before else {}) | told.model_dump(exclude_none=True)
    if told.step:
        values["advice"] = told.advice
    return _with_steps(Progress.model_validate(values))


def at_rest(progress: Progress | None) -> Progress | None:
    """`progress` without what only holds while steps are made: an estimated end must not stand where nothing moves."""
    if progress is None:
        return None
    passing = ("remaining_seconds", "eta", "tokens_per_second", "trainer_idle", "generator_idle")
    return progress.model_copy(update=dict.fromkeys(passing))


def at_the_end(progress: Progress | None) -> Progress | None:
    """The progress of a job that succeeded: all steps made."""
    if progress is None:
        return None
    total = progress.total_steps
    done = {"step": total} if total is not None else {}
    return _with_steps(progress.model_copy(update={**done, "remaining_seconds": None}))


def _with_steps(progress: Progress) -> Progress:
    if progress.step is None:
        return progress
    total = f"/{progress.total_steps}" if progress.total_steps is not None else ""
    return progress.model_copy(update={"steps": f"{progress.step}{total}", "eta": _duration(progress.remaining_seconds)})


def _duration(seconds: int | None) -> str | None:
    """Seconds for people, to about two digits: 45s, 12m, 2h05m, 3d4h."""
    if seconds is None:
        return None
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d{hours % 24}h"
    if hours:
        return f"{hours}h{minutes % 60:02}m"
    return f"{minutes}m" if minutes else f"{seconds}s"
