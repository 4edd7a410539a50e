"""Retrying that leads nowhere is ended: the same step, and no newer checkpoint, several times."""

from __future__ import annotations

from pathlib import Path

import pytest

from otj_runtime.api import Reason
from otj_runtime.launch.resumption import SAME_STEP_FAILURES, judge_failure
from otj_runtime.pod.errors import FailureNote

CRASH = FailureNote(reason=Reason.TRAINER_CRASHED, message="boom")


def fail(output: Path, *, step: int | None = 57, job: str = "uid-1", note: FailureNote = CRASH) -> Reason:
    return judge_failure(note, output=output, job=job, step=step).reason


def test_the_third_failure_at_one_step_is_the_last(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-50").mkdir()
    assert [fail(tmp_path) for _ in range(SAME_STEP_FAILURES - 1)] == [Reason.TRAINER_CRASHED] * (SAME_STEP_FAILURES - 1)
    note = judge_failure(CRASH, output=tmp_path, job="uid-1", step=57)
    assert note.reason is Reason.NO_NEW_CHECKPOINT
    assert note.message == (
        "failed 3 times at step 57 without a new checkpoint (the newest is still of step 50); the last time with TrainerCrashed: boom"
    )


def test_a_newer_checkpoint_begins_the_count_anew(tmp_path: Path) -> None:
    for step in (50, 55, 60):
        (tmp_path / f"checkpoint-{step}").mkdir()
        assert fail(tmp_path, step=62) is Reason.TRAINER_CRASHED


def test_failures_at_different_steps_are_bad_luck(tmp_path: Path) -> None:
    assert {fail(tmp_path, step=step) for step in (57, 58, 57, 58, 57)} == {Reason.TRAINER_CRASHED}


@pytest.mark.parametrize(
    "excused",
    [
        {"step": None},
        {"step": 0},
        {"job": ""},
        {"note": FailureNote(reason=Reason.TERMINATED, message="drained")},
        {"note": FailureNote(reason=Reason.REWARD_FAILED, message="sample 3")},
    ],
)
def test_what_says_nothing_about_checkpoints_is_not_counted(tmp_path: Path, excused: dict[str, object]) -> None:
    reasons = {fail(tmp_path, **excused) for _ in range(5)}  # type: ignore[arg-type]
    assert Reason.NO_NEW_CHECKPOINT not in reasons


def test_failures_of_an_earlier_run_with_the_same_output_do_not_count(tmp_path: Path) -> None:
    for _ in range(SAME_STEP_FAILURES - 1):
        fail(tmp_path, job="an-earlier-one")
    assert fail(tmp_path) is Reason.TRAINER_CRASHED


def test_a_broken_record_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "failures.json").write_text("{")
    assert fail(tmp_path) is Reason.TRAINER_CRASHED
