"""The advice on the split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otj_runtime.pod.split import Advice, Split, advise, split_metrics

SHARE = st.floats(0, 1)


@pytest.mark.parametrize(
    ("split", "staleness", "idle", "advice"),
    [
        # Seven GPUs wait for one: half of them should generate. 7 x 0.25 x 8 = 14 and 1 x 8 = 8 GPU-seconds of work.
        (Split(7, 1), 1, (0.75, 0.0), Split(5, 3)),
        # The other way round.
        (Split(2, 6), 1, (0.0, 0.8), Split(5, 3)),
        # Balanced already.
        (Split(4, 4), 1, (0.02, 0.05), None),
        # Taking turns, each side is idle while the other works; that is no reason to move anything.
        (Split(4, 4), 0, (0.5, 0.5), None),
        (Split(1, 1), 1, (0.9, 0.0), None),
    ],
)
def test_accelerators_go_where_the_work_is(split: Split, staleness: int, idle: tuple[float, float], advice: Split | None) -> None:
    found = advise(split, per_engine=1, staleness=staleness, step_s=8.0, idle_trainer=idle[0], idle_generator=idle[1])
    assert (found and found.split) == advice


@given(
    training=st.integers(1, 16),
    engines=st.integers(1, 8),
    per_engine=st.integers(1, 4),
    staleness=st.integers(0, 2),
    step_s=st.floats(0.1, 1000),
    idle_trainer=SHARE,
    idle_generator=SHARE,
)
def test_an_advice_is_a_possible_split_that_is_clearly_faster_and_not_worse_than_any_other(
    training: int, engines: int, per_engine: int, staleness: int, step_s: float, idle_trainer: float, idle_generator: float
) -> None:
    split = Split(training, engines * per_engine)
    measured = {"staleness": staleness, "step_s": step_s, "idle_trainer": idle_trainer, "idle_generator": idle_generator}
    found: Advice | None = advise(split, per_engine=per_engine, **measured)  # type: ignore[arg-type]
    if found is None:
        return
    assert found.split.training + found.split.generation == training + engines * per_engine
    assert found.split.training >= 1
    assert found.split.generation % per_engine == 0 < found.split.generation
    assert 0 <= found.step_s <= 0.9 * step_s
    assert found.step_s >= 0.99 * step_s * ((1 - idle_trainer) * training + (1 - idle_generator) * split.generation) / (
        (training + split.generation) * (1 if staleness else 2)
    )


@given(training=st.integers(1, 16), generation=st.integers(1, 16), step_s=st.floats(0.1, 1000))
def test_two_busy_sides_are_left_alone(training: int, generation: int, step_s: float) -> None:
    assert advise(Split(training, generation), per_engine=1, staleness=1, step_s=step_s, idle_trainer=0.0, idle_generator=0.0) is None


def test_the_advice_is_reported_as_metrics_once_a_step_was_measured() -> None:
    measured = {"step_time": 8.0, "idle/trainer": 0.75, "idle/generator": 0.0}
    assert split_metrics(Split(7, 1), {"loss": 1.0}, per_engine=1, staleness=1) == {}
    advised = split_metrics(Split(7, 1), measured, per_engine=1, staleness=1)
    assert advised["split/generation_gpus"] == 3
    assert advised["split/step_time"] == pytest.approx(14 / 5)
    kept = split_metrics(Split(7, 1), measured | {"idle/trainer": 0.0}, per_engine=1, staleness=1)
    assert kept == {"split/generation_gpus": 1, "split/step_time": 8.0}
