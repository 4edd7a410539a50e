"""Seconds from the pod's start to each phase."""

from __future__ import annotations

import time
from pathlib import Path

from otj_runtime.api import OnlineTrainingJob
from otj_runtime.pod.config import Layout, PodConfig, resolve
from otj_runtime.pod.startup import StartUp, leave_stamp, stamp_path


def config_in(folder: Path) -> PodConfig:
    spec = {"algorithm": "GRPO", "model": {"name": "builtin/tiny-copy"}, "dataset": {"task": "copy"}, "gpus": 2}
    job = OnlineTrainingJob.model_validate(
        {"apiVersion": "onlinetraining.dev/v1alpha1", "kind": "OnlineTrainingJob", "metadata": {"name": "run"}, "spec": spec}
    )
    return resolve(job, Layout(scratch=str(folder)))


def test_a_phase_is_noted_when_it_is_first_seen() -> None:
    now = 100.0
    startup = StartUp(90.0, clock=lambda: now)
    assert startup.look(generator=False, trainer=True)
    now = 130.0
    assert startup.look(generator=True, trainer=True)
    assert not startup.look(generator=True, trainer=True)
    assert startup.seconds == {"trainer": 10.0, "generator": 40.0}
    assert startup.describe() == "trainer 10 s, generator 40 s"


def test_the_first_step_tells_of_both_sides_whichever_was_looked_at_later() -> None:
    startup = StartUp(90.0, clock=lambda: 100.0)
    assert startup.look(generator=False, trainer=True, first_step=True)
    assert startup.seconds == {"generator": 10.0, "trainer": 10.0, "first_step": 10.0}


def test_the_clock_runs_from_the_first_container_of_the_pod(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    leave_stamp(config)
    stamp_path(config).write_text(str(time.time() - 60))
    assert 60 <= StartUp.of(config).seconds["launcher"] < 70


def test_without_a_stamp_it_runs_from_the_launchers_start(tmp_path: Path) -> None:
    assert StartUp.of(config_in(tmp_path)).seconds["launcher"] < 1
