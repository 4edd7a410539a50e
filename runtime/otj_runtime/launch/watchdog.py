"""When silence means that a run hangs. Pure: times in, a sentence or nothing out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from otj_runtime.launch.board import Board


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long the launcher waits for what, in seconds."""

    first_step: float = 1800.0
    """From the start of the ranks (or of the generator, if later) to the first update: loading, compiling, the first rollouts."""
    step: float = 900.0
    """Between two updates, at least; the last held-out evaluation and the final save lie between two as well."""
    step_factor: float = 10.0
    """Between two updates, as a multiple of the last step's duration: the longer of both counts."""
    generator_lost: float = 600.0
    """From the last answer of a generator that has answered before: a restart in place, a crash loop's back-off included."""
    save: float = 105.0
    """From SIGTERM to SIGKILL once training: the pod's grace period less what the end itself takes."""
    leave: float = 10.0
    """From SIGTERM to SIGKILL when there is nothing to save, or when the ranks hang."""


def stalled(board: Board, patience: Patience, *, started: float, now: float) -> str | None:
    """What has been waited for too long; None while there is hope.

    Args:
        started: monotonic time from which the ranks could work: they run and the generator answers.
    """
    if board.last_update is None or not board.step:
        unheard = board.last_update is None
        silence, limit = now - max(started, board.last_update or 0.0), patience.first_step
        awaited = "the first report of the trainer" if unheard else "the first training step"
    else:
        silence, limit = now - board.last_update, max(patience.step, patience.step_factor * (board.seconds_per_step or 0.0))
        last = board.total_steps is not None and board.step >= board.total_steps
        awaited = f"the end after the last step, {board.step}" if last else f"step {board.step + 1} of {board.total_steps or '?'}"
    return f"no progress for {silence:.0f} s while waiting for {awaited}; the limit is {limit:.0f} s" if silence > limit else None


OVERDUE_FACTOR = 4.0
"""A step that takes this many times as long as the last one is worth a word."""

OVERDUE_SECONDS = 60.0
"""And at least this long: short steps vary more."""


def overdue(board: Board, patience: Patience, *, now: float, wall: datetime) -> str | None:
    """The sentence for people while a step is late but not yet given up. It names moments, not durations, so that it stays the same.

    Args:
        now: monotonic time.
        wall: the same moment by the clock.
    """
    usual = board.seconds_per_step
    if board.last_update is None or not board.step or usual is None or board.step == board.total_steps:
        return None
    if now - board.last_update <= max(OVERDUE_SECONDS, OVERDUE_FACTOR * usual):
        return None
    last = wall - timedelta(seconds=now - board.last_update)
    until = last + timedelta(seconds=max(patience.step, patience.step_factor * usual))
    return (
        f"Step {board.step + 1} of {board.total_steps or '?'} is overdue: the last one took {usual:.3g} s and ended at {last:%H:%M:%S}Z; "
        f"without another the pod fails as Stalled at {until:%H:%M:%S}Z."
    )
