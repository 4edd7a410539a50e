"""LoRA with a real vLLM: the adapter alone goes to the generator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from otj_runtime.pod.metrics import read_metrics
from tests.integration.test_otj_run import finish, otj_run

pytestmark = [pytest.mark.integration, pytest.mark.nightly]

STEPS = 4
MODEL_BYTES = 400_000
"""The tiny model has 133 thousand parameters of 4 bytes; its adapter a tenth of that."""


def test_an_adapter_is_trained_sent_alone_and_proven(tmp_path: Path) -> None:
    options = ("--set", "gpus=2", "--set", "lora={rank: 4, sync: adapter}", "--set", f"training.max_steps={STEPS}")
    process = otj_run("grpo-copy.yaml", tmp_path / "run", *options, "--result", str(tmp_path / "result.json"))
    output = finish(process)
    assert process.returncode == 0, output[-5000:]
    lines = [line.metrics for line in read_metrics(tmp_path / "run" / "output" / "metrics.jsonl")[0] if line.metrics]
    assert len(lines) == STEPS
    assert max(line["sync/max_abs_logprob_diff"] for line in lines) <= 1e-4
    assert max(line["sampling/sampling_logp_difference/max"] for line in lines) <= 1e-3
    assert max(line["sync/bytes"] for line in lines) < MODEL_BYTES / 4
    assert json.loads((tmp_path / "result.json").read_text())["sync"]["count"] >= STEPS
    adapter = load_file(tmp_path / "run" / "output" / "model" / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in adapter.items() if "lora_B" in name)
