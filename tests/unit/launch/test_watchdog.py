"""When silence means a hang."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from otj_runtime.launch.board import Board
from otj_runtime.launch.watchdog import Patience, overdue, stalled
from otj_runtime.pod.metrics import Metric, TrainerStatus

PATIENCE = Patience(first_step=100.0, step=50.0, step_factor=10.0)


def board_after(*, at: float, **metrics: float) -> Board:
    """A board that heard these metrics at time `at`."""
    board = Board()
    board.absorb(TrainerStatus(metrics=[Metric(name=name, value=str(value)) for name, value in metrics.items()]), now=at)
    return board


@pytest.mark.parametrize(
    ("board", "limit", "awaited"),
    [
        (Board(), 100.0, "the first report of the trainer"),
        (board_after(at=0.0, total_steps=9), 100.0, "the first training step"),
        (board_after(at=0.0, current_step=3, total_steps=9, step_time=1.0), 50.0, "step 4 of 9"),
        (board_after(at=0.0, current_step=3, step_time=20.0), 200.0, "step 4 of ?"),
        (board_after(at=0.0, current_step=9, total_steps=9), 50.0, "the end after the last step, 9"),
    ],
)
def test_silence_beyond_the_limit_names_what_was_waited_for(board: Board, limit: float, awaited: str) -> None:
    assert stalled(board, PATIENCE, started=0.0, now=limit - 0.1) is None
    message = stalled(board, PATIENCE, started=0.0, now=limit + 0.1)
    assert message is not None
    assert awaited in message


def test_a_late_generator_does_not_count_against_the_trainer() -> None:
    assert stalled(board_after(at=0.0, total_steps=9), PATIENCE, started=500.0, now=590.0) is None


def test_a_late_step_is_said_before_it_is_given_up_and_always_with_the_same_words() -> None:
    board = board_after(at=100.0, current_step=12, total_steps=150, step_time=20.0)
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)

    def said(seconds: float) -> str | None:
        return overdue(board, PATIENCE, now=100.0 + seconds, wall=noon + timedelta(seconds=seconds))

    assert said(79.0) is None
    assert said(81.0) == said(120.0)
    assert said(81.0) == (
        "Step 13 of 150 is overdue: the last one took 20 s and ended at 12:00:00Z; without another the pod fails as Stalled at 12:03:20Z."
    )
