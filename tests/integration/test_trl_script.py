"""An unmodified TRL script in our pod: real TRL, real vLLM, real ranks, on CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from otj_runtime.pod.metrics import LauncherReport, read_metrics
from tests.integration.test_otj_run import SAMPLES, finish, otj_run

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 8


def test_the_sample_carries_the_example_as_it_is() -> None:
    documents = list(yaml.safe_load_all((SAMPLES / "trl-script.yaml").read_text()))
    assert documents[1]["data"]["trl_grpo.py"] == (EXAMPLES / "trl_grpo.py").read_text()


def test_a_trl_script_trains_with_proven_syncs_and_reports_its_progress(tmp_path: Path) -> None:
    script = f'[python, /scripts/trl_grpo.py, --model, $(OTJ_MODEL_PATH), --max_steps, "{STEPS}"]'
    options = ("--volume", f"scripts={EXAMPLES}", "--set", f"trainer.command={script}", "--result", str(tmp_path / "result.json"))
    process = otj_run("trl-script.yaml", tmp_path / "run", *options)
    output = finish(process)
    assert process.returncode == 0, output[-5000:]
    lines, _ = read_metrics(tmp_path / "run" / "output" / "metrics.jsonl")
    assert [line.step for line in lines] == list(range(1, STEPS + 1))
    # Every step changed the weights, and after each the generator scored the probe as the trainer did.
    assert [line.metrics["policy_version"] for line in lines] == list(range(STEPS))
    assert max(line.metrics["sync/max_abs_logprob_diff"] for line in lines) <= 1e-4
    assert max(line.metrics["sampling/sampling_logp_difference/max"] for line in lines) <= 1e-4
    progress = LauncherReport.model_validate_json((tmp_path / "run" / "termination.json").read_text()).progress
    assert (progress.step, progress.total_steps, progress.world_size) == (STEPS, STEPS, 2)
    assert progress.reward is not None
    assert json.loads((tmp_path / "result.json").read_text())["sync"]["count"] == STEPS
    assert (tmp_path / "run" / "output" / "trl" / "model.safetensors").is_file()
