"""Progress: what the trainer reports becomes the progress document."""

from __future__ import annotations

import pytest

from otj_runtime.launch.board import Board
from otj_runtime.pod.metrics import Metric, TrainerStatus
from otj_runtime.pod.transfer import Transfer


def status(remaining: int | None = None, **metrics: object) -> TrainerStatus:
    """An update with these metrics."""
    return TrainerStatus(
        estimatedRemainingSeconds=remaining, metrics=[Metric(name=name, value=str(value)) for name, value in metrics.items()]
    )


def test_before_the_first_word_the_run_is_starting_and_nothing_is_known() -> None:
    report = Board().report()
    assert report.phase == "starting"
    assert report.progress.model_dump(exclude_none=True) == {}


def test_a_step_makes_it_training_and_fills_the_document() -> None:
    board = Board()
    board.absorb(
        status(current_step=3, total_steps=10, reward=0.51234567, world_size=3, policy_version=2, seconds_per_step=2.0, loss=0.1), now=10.0
    )
    report = board.report()
    assert report.phase == "training"
    assert report.metrics["loss"] == "0.1"
    progress = report.progress
    assert (progress.step, progress.total_steps, progress.world_size, progress.policy_version) == (3, 10, 3, 2)
    assert (progress.reward, progress.seconds_per_step, progress.remaining_seconds) == ("0.5123", "2", 14)
    assert progress.last_updated is not None


def test_a_trainer_that_reports_no_times_is_measured() -> None:
    board = Board()
    board.absorb(status(current_step=1, total_steps=11), now=100.0)
    board.absorb(status(current_step=6, total_steps=11), now=110.0)
    assert board.seconds_per_step == pytest.approx(2.0)
    assert board.report().progress.remaining_seconds == 10


def test_the_trainers_own_estimate_of_the_end_counts_while_it_is_fresh() -> None:
    board = Board()
    board.absorb(status(remaining=77, current_step=1, total_steps=11, step_time=1), now=1.0)
    assert board.report().progress.remaining_seconds == 77
    board.absorb(status(current_step=2, total_steps=11), now=2.0)
    assert board.report().progress.remaining_seconds == 9


def test_metrics_stay_until_they_are_reported_again() -> None:
    board = Board()
    board.absorb(status(reward=0.5), now=1.0)
    board.absorb(status(current_step=1), now=2.0)
    assert board.report().progress.reward == "0.5"


@pytest.mark.parametrize("value", ["nan", "inf", "much", "-1"])
def test_a_step_that_is_no_count_is_ignored(value: str) -> None:
    board = Board()
    board.absorb(status(current_step=value), now=1.0)
    assert board.report().progress.step is None


def test_the_readings_come_from_our_metrics_and_the_checkpoint_from_the_folder() -> None:
    board = Board()
    metrics = {"kl": 0.0123456, "tokens_per_second": 812.3, "sync/total_s": 0.52, "async/staleness_mean": 1}
    board.absorb(status(current_step=3, **metrics), now=1.0)
    board.checkpoint = (2, 0.0)
    progress = board.report().progress
    assert (progress.kl, progress.tokens_per_second, progress.sync_seconds, progress.staleness) == ("0.01235", "812.3", "0.52", "1")
    assert (progress.checkpoint_step, progress.checkpoint_time) == (2, "1970-01-01T00:00:00Z")


def test_a_faster_split_is_advised_with_its_estimate_and_none_where_there_is_none() -> None:
    board = Board()
    board.absorb(status(**{"current_step": 3, "step_time": 8.0, "split/generation_gpus": 3, "split/step_time": 2.8}), now=1.0)
    assert board.report().progress.advice == "generation.gpus: 3 would take about 2.8 s a step instead of 8 s, for the same batch"
    board.absorb(status(**{"split/generation_gpus": 1, "split/step_time": 8.0}), now=2.0)
    assert board.report().progress.advice is None


def test_the_way_of_the_weights_is_shown_with_its_reason_and_the_speed_of_the_last_sync() -> None:
    board = Board(Transfer("delta", "asked for"))
    assert board.report().progress.weight_transfer == "delta: asked for"
    board.absorb(status(**{"sync/bytes": 3e9, "sync/total_s": 0.1}), now=1.0)
    assert board.report().progress.weight_transfer == "delta, 30 GB/s: asked for"
    board.transfer = Transfer("mailbox", "nccl was asked for, but nccl is not possible: one GPU")
    assert board.report().progress.weight_transfer == "mailbox, 30 GB/s: nccl was asked for, but nccl is not possible: one GPU"
