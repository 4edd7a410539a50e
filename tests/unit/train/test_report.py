"""The report of a run: what it shows, that it opens without a server, and that its size is bounded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otj_runtime.train.html_report import read_story, render, write_report
from otj_runtime.train.svg import POINTS, Line, axis, chart, number, smooth, thin

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False)
POINT_LISTS = st.lists(NUMBERS, min_size=1, max_size=400).map(lambda values: [(float(i), value) for i, value in enumerate(values)])


def metrics_file(path: Path, *, steps: int, prompt: str = "1 + 1?", completion: str = "2", **metrics: float) -> Path:
    with path.open("w") as file:
        for step in range(1, steps + 1):
            answers = [{"prompt": prompt, "completion": f"{completion} at {step}", "reward": 1.0}]
            found = {"reward": step / steps, "sync/total_s": 0.5, "idle/trainer": 0.2, "idle/generator": 0.1} | metrics
            line: dict[str, Any] = {"step": step, "totalSteps": steps, "time": 1e9 + step, "metrics": found, "completions": answers}
            file.write(json.dumps(line) + "\n")
    return path


def page(path: Path) -> str:
    return render(read_story(path), title="a run", facts={"Method": "GRPO"})


def test_it_shows_the_numbers_the_charts_and_the_first_and_last_completions(tmp_path: Path) -> None:
    text = page(metrics_file(tmp_path / "m", steps=40))
    for words in ("a run", "Reward", "Idle share", "Weight sync", "2 at 1", "2 at 40", "Step 1<", "Step 40<"):
        assert words in text
    assert "2 at 20" not in text


def test_what_a_model_wrote_cannot_act_on_the_page(tmp_path: Path) -> None:
    text = page(metrics_file(tmp_path / "m", steps=2, completion="<script>alert(1)</script>", prompt='"><img src=x>'))
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text


def test_it_fetches_nothing(tmp_path: Path) -> None:
    text = page(metrics_file(tmp_path / "m", steps=5))
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://", text)


def test_every_chart_is_well_formed_and_names_itself(tmp_path: Path) -> None:
    found = re.findall(r"<svg.*?</svg>", page(metrics_file(tmp_path / "m", steps=100)), re.DOTALL)
    assert len(found) >= 3
    for picture in found:
        root = ElementTree.fromstring(picture)
        assert root.get("role") == "img"
        assert root.get("aria-label")


def test_a_long_run_with_long_completions_makes_a_bounded_page(tmp_path: Path) -> None:
    text = page(metrics_file(tmp_path / "m", steps=20_000, completion="x" * 5_000))
    assert len(text) < 150_000


@pytest.mark.parametrize("content", ["", '{"step": 0, "totalSteps": 9, "time": 1.0}\n', '{"step": 1, "totalSteps": 9, "time": 1.0, "me'])
def test_a_run_that_hardly_began_has_a_report_too(content: str, tmp_path: Path) -> None:
    (tmp_path / "m").write_text(content)
    write_report(tmp_path / "m", tmp_path / "report.html", title="a run", facts={})
    assert "a run" in (tmp_path / "report.html").read_text()
    assert len(list(tmp_path.iterdir())) == 2


def test_several_reward_functions_are_drawn_beside_each_other(tmp_path: Path) -> None:
    path = metrics_file(tmp_path / "m", steps=3, **{"rewards/exact_match/mean": 0.5, "rewards/length/mean": 0.25})
    assert "Reward functions" in page(path)


@given(points=POINT_LISTS)
def test_a_thinned_and_smoothed_line_stays_within_its_values(points: list[tuple[float, float]]) -> None:
    drawn = smooth(thin(points, POINTS))
    values = [value for _, value in points]
    slack = 1e-6 * max(1.0, *map(abs, values))
    assert len(drawn) <= POINTS
    assert all(min(values) - slack <= value <= max(values) + slack for _, value in drawn)
    assert [step for step, _ in drawn] == sorted({step for step, _ in drawn})


@given(a=NUMBERS, b=NUMBERS)
def test_an_axis_has_a_few_round_ticks_within_its_range(a: float, b: float) -> None:
    found = axis(min(a, b), max(a, b))
    assert 1 <= len(found.ticks) <= 10
    assert list(found.ticks) == sorted(found.ticks)
    assert found.low < found.high


@given(points=POINT_LISTS)
def test_any_line_can_be_drawn(points: list[tuple[float, float]]) -> None:
    ElementTree.fromstring(chart("a <title>", [Line('the "line"', points)]))


def test_a_chart_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="has no points"):
        chart("empty", [Line("nothing", [])])


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.123"), (0.0, "0"), (1234.0, "1234"), (12345.0, "12.3k"), (8e6, "8M"), (-2.5e9, "-2.5G")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
