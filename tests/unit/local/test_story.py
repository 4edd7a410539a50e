"""What a run tells while it goes and at its end."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from otj_runtime.api import Reason
from otj_runtime.local.folder import RunFolder
from otj_runtime.local.follow import Story
from otj_runtime.local.pod import LocalPod, Outcome
from otj_runtime.local.result import answers_table, build_result, duration, summary
from otj_runtime.local.view import PlainView, panel_rows, sparkline
from otj_runtime.pod.errors import FailureNote
from otj_runtime.pod.metrics import Answer, HeldOut, MetricsLine, append_line

SUCCESS = Outcome(0, None, "trainer")


def step(number: int, *, reward: float = 0.5, total: int = 10) -> MetricsLine:
    """The line of a step, made one second after the one before it."""
    metrics = {
        "reward": reward,
        "step_time": 1.0,
        "tokens_generated": 100.0 * number,
        "world_size": 3.0,
        "sync/total_s": 0.1 * number,
        "sync/max_abs_logprob_diff": 1e-6 * number,
    }
    return MetricsLine(step=number, total_steps=total, time=1000.0 + number, metrics=metrics)


def advised(line: MetricsLine) -> MetricsLine:
    """The line of a step whose split is not the best."""
    return MetricsLine(
        step=line.step,
        total_steps=line.total_steps,
        time=line.time,
        metrics=line.metrics | {"split/generation_gpus": 2.0, "split/step_time": 0.75},
    )


def heldout(accuracy: float, completion: str, *, at: int) -> MetricsLine:
    """The line of a held-out evaluation."""
    answers = [Answer(prompt="1+1=", completion=completion, reward=accuracy)]
    return MetricsLine(step=at, total_steps=10, time=1000.0 + at, heldout=HeldOut(accuracy=accuracy, answers=answers))


def story_of(path: Path, *lines: MetricsLine, began: float = 1000.0) -> Story:
    """A story that was read from a file with these lines."""
    for line in lines:
        append_line(path, line)
    story = Story(path, began=began)
    story.refresh()
    return story


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def test_a_file_that_does_not_exist_yet_tells_nothing(metrics: Path) -> None:
    story = Story(metrics, began=0.0)
    assert story.refresh() == []
    assert story.seconds_left() is None
    assert story.tokens_per_second() is None


def test_new_lines_are_told_once_and_those_of_an_earlier_run_never(metrics: Path) -> None:
    story = Story(metrics, began=1002.0)
    append_line(metrics, step(1))
    append_line(metrics, step(2))
    assert [line.step for line in story.refresh()] == [2]
    append_line(metrics, step(3))
    assert [line.step for line in story.refresh()] == [3]
    assert [line.step for line in story.steps] == [1, 2, 3]


def test_a_resumed_run_that_replaces_the_file_is_read_from_its_beginning(metrics: Path) -> None:
    story = story_of(metrics, step(1), step(2), step(3), began=0.0)
    draft = metrics.with_suffix(".draft")
    append_line(draft, step(1))
    draft.replace(metrics)
    append_line(metrics, step(2, reward=0.9))
    story.refresh()
    assert story.rewards == [0.5, 0.9]


def test_pace_and_time_to_go_come_from_the_last_steps(metrics: Path) -> None:
    story = story_of(metrics, *map(step, (1, 2, 3, 4)))
    assert story.tokens_per_second() == pytest.approx(100.0)
    assert story.seconds_left() == pytest.approx(6.0)
    assert story.first_reward_after == pytest.approx(1.0)


def test_the_result_says_what_the_run_came_to(metrics: Path) -> None:
    steps = [step(number, reward=number / 10) for number in range(1, 11)]
    story = story_of(metrics, heldout(0.0, "11", at=0), *steps, heldout(1.0, "2", at=10))
    result = build_result(story, SUCCESS, wall_s=61.26, generator_version="0.32.0")
    assert result == {
        "succeeded": True,
        "steps": 10,
        "world_size": 3,
        "reward": [pytest.approx(0.3), pytest.approx(0.8)],
        "wall_s": 61.3,
        "first_reward_s": 1.0,
        "sync": {"count": 10, "max_abs_logprob_diff": pytest.approx(1e-5), "p50_s": pytest.approx(0.55)},
        "tokens_generated": 1000,
        "advice": None,
        "heldout": [0.0, 1.0],
        "generator": "vllm 0.32.0",
    }
    assert "10 steps in 1 min 01 s on 3 training ranks, vllm 0.32.0" in summary(result)


def test_a_split_that_would_have_been_faster_is_told_at_the_end(metrics: Path) -> None:
    result = build_result(story_of(metrics, step(1), advised(step(2))), SUCCESS, wall_s=2.0, generator_version=None)
    assert "advice    generation.gpus: 2 would take about 0.75 s a step instead of 1 s" in summary(result)


def test_a_run_that_failed_before_its_first_step_has_a_result_too(metrics: Path) -> None:
    outcome = Outcome(67, FailureNote(reason=Reason.REWARD_IMPORT_FAILED, message="no"), "trainer")
    result = build_result(Story(metrics, began=0.0), outcome, wall_s=1.0, generator_version=None)
    assert (result["succeeded"], result["reason"], result["message"]) == (False, "RewardImportFailed", "no")
    assert (result["reward"], result["heldout"], result["generator"]) == (None, None, None)


def test_answers_stand_side_by_side(metrics: Path) -> None:
    story = story_of(metrics, heldout(0.0, "[red]11", at=0), heldout(1.0, "2", at=10))
    console = Console(file=io.StringIO(), width=80)
    console.print(answers_table(*story.heldout))
    assert isinstance(console.file, io.StringIO)
    assert "1+1=" in console.file.getvalue()
    assert "[red]11" in console.file.getvalue()


@pytest.mark.parametrize(
    ("values", "expected"), [([], ""), ([1.0], "▁"), ([0.0, 1.0], "▁█"), ([0.5, 0.5], "▁▁"), ([float(n) for n in range(96)], None)]
)
def test_a_sparkline_shows_the_course_in_a_bounded_width(values: list[float], expected: str | None) -> None:
    line = sparkline(values, width=8)
    assert line == "▁▂▃▄▅▆▇█" if expected is None else line == expected


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (125, "2 min 05 s"), (7800, "2 h 10 min")])
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def pod(tmp_path: Path) -> LocalPod:
    return LocalPod({}, RunFolder(tmp_path), "http://127.0.0.1:1")


def test_without_a_terminal_each_step_is_one_line(metrics: Path, pod: LocalPod) -> None:
    story = Story(metrics, began=0.0)
    console = Console(file=io.StringIO(), width=40)
    view = PlainView(console, pod, story)
    for line in (step(1), step(2), heldout(0.25, "x", at=2)):
        append_line(metrics, line)
        view.update(story.refresh())
    assert isinstance(console.file, io.StringIO)
    first, second, third = console.file.getvalue().splitlines()
    assert first.startswith("step 1/10  reward 0.5")
    assert second.endswith("100 tokens/s  8 s to go")
    assert third == "held-out accuracy 0.250 at step 2"


def test_the_panel_can_be_drawn_at_every_point_of_a_run(metrics: Path, pod: LocalPod) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    story = Story(metrics, began=0.0)
    shown = []
    for phase, line in (
        ("model", None),
        ("trainer", None),
        ("trainer", heldout(0.1, "x", at=0)),
        ("trainer", step(1)),
        ("trainer", step(10)),
    ):
        pod.phase = phase
        if line is not None:
            append_line(metrics, line)
        story.refresh()
        with console.capture() as capture:
            console.print(*panel_rows(pod, story))
        shown.append(capture.get())
    assert "preparing the model" in shown[0]
    assert "starting vLLM" in shown[1]
    assert "step 10/10" in shown[-1]
