"""A run that is killed or told to stop, and the run that goes on: together they are the run that nothing happened to.

Each run is a process of its own, as in life, forked from one that has imported everything.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from otj_runtime.data.model import build_tiny
from otj_runtime.pod.metrics import read_metrics
from otj_runtime.train.checkpoints import INCOMPLETE, complete_checkpoints, newest_checkpoint
from otj_runtime.train.generator import Generator, pod_generator
from tests.integration import conftest
from tests.integration.deadlines import HANG_SECONDS
from tests.integration.killable import train

pytestmark = pytest.mark.integration

ARGUMENTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_generations": 8,
    "max_completion_length": 4,
    "max_steps": 5,
    "save_steps": 1,
    "save_total_limit": 2,
    "seed": 3,
}
"""Two optimizer steps of two micro-batches per generation: checkpoints fall into the middle of generations too."""

OF_THE_CLOCK = ("time/", "step_time", "idle/", "gen/", "tokens_per_second")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny(folder)
    return folder


def run(
    tiny: Path, output: Path, blow: tuple[str, str] | None = None, *, generator: Generator | None = None, **more: Any
) -> tuple[int | None, str]:
    """Exit status of a run, and how it says it ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.integration.killable"])
    process = context.Process(target=train, args=(str(tiny), str(output), ARGUMENTS | more, blow, generator))
    process.start()
    process.join(HANG_SECONDS)
    process.kill()
    end = output / "end"
    return process.exitcode, end.read_text() if end.exists() else ""


def numbers(output: Path) -> list[dict[str, float]]:
    """Every metric of every step but those that a clock makes."""
    lines, _ = read_metrics(output / "metrics.jsonl")
    return [{name: value for name, value in line.metrics.items() if not name.startswith(OF_THE_CLOCK)} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    output = tmp_path_factory.mktemp("undisturbed")
    assert run(tiny, output) == (0, "finished 5")
    assert [path.name for path in complete_checkpoints(output)] == ["checkpoint-4", "checkpoint-5"]
    return numbers(output)


@pytest.mark.parametrize(
    ("blow", "survives"),
    [
        (("SIGKILL", "backward:3"), "checkpoint-1"),  # in the middle of step 2, whose generation began with step 1
        (("SIGKILL", "save:4"), "checkpoint-3"),
        (("SIGTERM", "backward:5"), "checkpoint-2"),  # between the micro-batches of step 3
        (("SIGTERM", "generate:2"), "checkpoint-2"),  # before step 3 has its batches
    ],
)
def test_a_resumed_run_makes_the_very_steps_of_one_that_nothing_happened_to(
    tiny: Path, tmp_path: Path, undisturbed: list[dict[str, float]], blow: tuple[str, str], survives: str
) -> None:
    status = run(tiny, tmp_path, blow)
    assert status == ((-signal.SIGKILL, "") if blow[0] == "SIGKILL" else (0, f"stopped {survives.removeprefix('checkpoint-')}"))
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == survives
    assert run(tiny, tmp_path) == (0, "finished 5")
    assert numbers(tmp_path) == undisturbed
    assert not list((tmp_path / INCOMPLETE).glob("*"))


def test_a_run_that_ended_after_its_last_checkpoint_makes_no_step_again(
    tiny: Path, tmp_path: Path, undisturbed: list[dict[str, float]]
) -> None:
    assert run(tiny, tmp_path) == (0, "finished 5")
    assert run(tiny, tmp_path) == (0, "finished 5")
    assert numbers(tmp_path) == undisturbed


@pytest.fixture(scope="module")
def served(tiny: Path, generator: Callable[..., conftest.Generator]) -> Generator:
    return pod_generator(generator(tiny).config)


def prompts(output: Path) -> list[list[str]]:
    """What each step asked."""
    tables = sorted((output / "completions").glob("*.parquet"))
    return [pyarrow.parquet.read_table(table)["prompt"].to_pylist() for table in tables]


def versions(output: Path) -> dict[int, float]:
    """The version of the weights that completions came from, by the step that sampled them."""
    lines, _ = read_metrics(output / "metrics.jsonl")
    return {line.step: line.metrics["policy_version"] for line in lines if "reward" in line.metrics}


def random_states(output: Path) -> dict[str, Any]:
    """Where the random numbers of the process stood at the end."""
    states: dict[str, Any] = torch.load(output / "checkpoint-5" / "rng_state.pth", weights_only=False)
    return states | {
        "cpu": states["cpu"].tolist(),
        "numpy": [part.tolist() if hasattr(part, "tolist") else part for part in states["numpy"]],
    }


def test_with_vllm_a_resumed_run_has_the_prompts_versions_and_random_numbers_of_an_undisturbed_one(
    tiny: Path, tmp_path: Path, served: Generator
) -> None:
    # vLLM samples for itself, so the completions differ; what decides everything else must not.
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(tiny, whole, generator=served, log_completions=True) == (0, "finished 5")
    assert run(tiny, broken, ("SIGKILL", "backward:3"), generator=served, log_completions=True) == (-signal.SIGKILL, "")
    assert run(tiny, broken, generator=served, log_completions=True) == (0, "finished 5")
    assert prompts(broken) == prompts(whole)
    assert versions(broken) == versions(whole) == {1: 0, 3: 2, 5: 4}
    assert random_states(broken) == random_states(whole)
