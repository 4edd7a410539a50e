"""`otj run` as its user types it: real vLLM, real accelerate ranks, no cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from otj_runtime.pod.metrics import read_metrics
from otj_runtime.train.checkpoints import checkpoint_step
from tests.integration.deadlines import HANG_SECONDS

pytestmark = pytest.mark.integration

SAMPLES = Path(__file__).parents[2] / "manifests" / "samples"

GENERATOR_UP, FIRST_STEP = " answers after ", "step 1/"
"""What a run prints when it has come so far."""


def otj_run(sample: str, run_dir: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "otj_runtime.cli", "run", str(SAMPLES / sample), "--run-dir", str(run_dir), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """The output of a process that must end by itself."""
    try:
        output, _ = process.communicate(timeout=HANG_SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"still running after {HANG_SECONDS:.0f} s:\n{output[-3000:]}")
    return output


def last_step(run_dir: Path) -> int:
    """The step that was reported last, 0 before the first."""
    lines, _ = read_metrics(run_dir / "output" / "metrics.jsonl")
    return lines[-1].step if lines else 0


def wait_for_step(run_dir: Path, step: int, *, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + HANG_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if last_step(run_dir) >= step:
            return
        time.sleep(0.5)
    pytest.fail(f"step {step} was not reached within {HANG_SECONDS:.0f} s; exit code {process.poll()}")


@pytest.fixture(scope="module")
def copy_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """The result of grpo-copy.yaml, its run folder and its output: one run for all tests that only look at it."""
    folder = tmp_path_factory.mktemp("copy")
    result = folder / "result.json"
    began = time.monotonic()
    process = otj_run("grpo-copy.yaml", folder / "run", "--result", str(result))
    output = finish(process)
    print(f"grpo-copy took {time.monotonic() - began:.0f} s, start of vLLM included")
    assert process.returncode == 0, output[-5000:]
    return json.loads(result.read_text()), folder / "run", output


def test_a_tiny_model_learns_to_copy(copy_run: tuple[dict[str, Any], Path, str]) -> None:
    result, _, _ = copy_run
    first, last = result["reward"]
    assert result["succeeded"]
    assert result["steps"] == 150
    assert first < 0.2
    assert last >= 0.95


def test_three_ranks_trained_beside_a_real_vllm(copy_run: tuple[dict[str, Any], Path, str]) -> None:
    result, _, _ = copy_run
    assert result["world_size"] == 3
    assert result["generator"].startswith("vllm ")


def test_every_sync_was_proven_within_its_bound(copy_run: tuple[dict[str, Any], Path, str]) -> None:
    result, _, _ = copy_run
    assert result["sync"]["count"] >= 150
    assert result["sync"]["max_abs_logprob_diff"] <= 1e-4


def test_every_step_is_reported_and_the_model_is_saved(copy_run: tuple[dict[str, Any], Path, str]) -> None:
    _, run_dir, output = copy_run
    lines, _ = read_metrics(run_dir / "output" / "metrics.jsonl")
    assert [line.step for line in lines if line.metrics] == list(range(1, 151))
    assert (run_dir / "output" / "model" / "model.safetensors").is_file()
    assert GENERATOR_UP in output
    assert FIRST_STEP in output
    assert "150/150" in output


def test_the_way_to_the_first_step_is_told_by_phase(copy_run: tuple[dict[str, Any], Path, str]) -> None:
    _, run_dir, _ = copy_run
    phases = json.loads((run_dir / "termination.json").read_text())["startup"]
    assert set(phases) == {"launcher", "generator", "trainer", "first_step"}
    assert phases["launcher"] <= min(phases["generator"], phases["trainer"])
    assert phases["first_step"] >= max(phases["generator"], phases["trainer"])


@pytest.fixture(scope="module")
def troubled_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """A run whose generator is killed, which is then stopped, and goes on: its folder, the step of its checkpoint, the last step."""
    run_dir = tmp_path_factory.mktemp("troubled") / "run"
    most = 400
    process = otj_run("grpo-copy.yaml", run_dir, "--set", f"training.max_steps={most}")
    wait_for_step(run_dir, 3, process=process)
    [generator] = generators_of(process.pid)
    os.killpg(generator, signal.SIGKILL)
    lost = last_step(run_dir)
    wait_for_step(run_dir, lost + 3, process=process)
    process.send_signal(signal.SIGINT)
    output = finish(process)
    checkpoints = sorted((run_dir / "output").glob("checkpoint-*"))
    assert len(checkpoints) == 1, output[-5000:]
    step = checkpoint_step(checkpoints[0])
    assert step is not None
    assert step < most, "it was not stopped, it ended by itself"
    process = otj_run("grpo-copy.yaml", run_dir, "--set", f"training.max_steps={step + 3}")
    output = finish(process)
    assert process.returncode == 0, output[-5000:]
    return run_dir, step, step + 3


def test_a_stopped_run_goes_on_from_the_checkpoint_it_saved(troubled_run: tuple[Path, int, int]) -> None:
    run_dir, _, last = troubled_run
    lines, _ = read_metrics(run_dir / "output" / "metrics.jsonl")
    assert [line.step for line in lines if line.metrics] == list(range(1, last + 1))


def test_a_killed_generator_costs_no_step_and_comes_back_with_the_current_weights(troubled_run: tuple[Path, int, int]) -> None:
    lines, _ = read_metrics(troubled_run[0] / "output" / "metrics.jsonl")
    assert max(line.metrics["sampling/sampling_logp_difference/max"] for line in lines if line.metrics) < 1e-3


@pytest.mark.parametrize(
    ("change", "reason", "words", "unseen"),
    [
        ("rewards=[{function: no_such_package.reward}]", "RewardImportFailed", "no_such_package", GENERATOR_UP),
        ("model={path: /no/such/model}", "ModelNotFound", "/no/such/model", GENERATOR_UP),
        ("dataset={path: /no/such/file.jsonl}", "DatasetInvalid", "/no/such/file.jsonl", GENERATOR_UP),
        # Only transformers knows its schedulers, so the ranks must have imported it, beside a vLLM that starts.
        pytest.param("training.lr_scheduler_type=zigzag", "InvalidSpec", "zigzag", FIRST_STEP, marks=pytest.mark.nightly),
    ],
)
def test_bad_input_ends_early_with_its_own_reason(tmp_path: Path, change: str, reason: str, words: str, unseen: str) -> None:
    options = ["--set", change]
    if change.startswith("dataset"):
        options += ["--set", "rewards=[{function: otj_runtime.rewards.exact_match}]"]
    process = otj_run("grpo-copy.yaml", tmp_path / "run", *options)
    output = finish(process)
    assert process.returncode != 0
    assert reason in output
    assert words in output
    assert unseen not in output


def generators_of(parent: int) -> list[int]:
    """Process groups of the vLLM servers below `parent`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode()
            below = int((folder / "stat").read_text().rsplit(") ", 1)[1].split()[1])
        except (OSError, ValueError):
            continue
        if below == parent and "vllm.entrypoints" in command:
            found.append(int(folder.name))
    return found
