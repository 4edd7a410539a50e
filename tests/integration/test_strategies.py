"""Whole runs on two CPU ranks under `accelerate launch`, completions from the model itself, one row per way to spread the model."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from otj_runtime.api import parse_job
from otj_runtime.data.model import build_tiny
from otj_runtime.launch import accelerate
from otj_runtime.pod.config import resolve
from otj_runtime.pod.metrics import read_metrics
from tests.unit.api.specs import changed

pytestmark = pytest.mark.integration

DEADLINE = 240.0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny(folder)
    return folder


def train(tiny: Path, output: Path, strategy: dict[str, Any], arguments: dict[str, Any]) -> None:
    """One run of strategy_rank.py, as the launcher would start it."""
    output.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = resolve(parse_job(changed({"gpus": 3, "accelerate": strategy})))
    keys = accelerate.settings(config) | {"use_cpu": True, "main_process_port": port}
    command = accelerate.command(
        keys,
        config_file=accelerate.write_settings(keys, output),
        threads=1,
        module="tests.integration.strategy_rank",
        arguments=[str(tiny), str(output), json.dumps(arguments)],
    )
    environment = os.environ | accelerate.environment(keys, threads=1)
    subprocess.run(command, env=environment, timeout=DEADLINE, check=True)


@pytest.mark.parametrize(
    ("strategy", "arguments", "checkpoint"),
    [
        ({"strategy": "ddp", "mixedPrecision": "bf16"}, {"bf16": True, "gradient_checkpointing": True}, "model.safetensors"),
        ({"strategy": "fsdp2"}, {}, "pytorch_model_fsdp_0"),
        pytest.param({"strategy": "fsdp2"}, {"gradient_checkpointing": True}, "pytorch_model_fsdp_0", marks=pytest.mark.nightly),
        pytest.param({"strategy": "ddp"}, {"lora": {"rank": 4}, "beta": 0.1}, "adapter_model.safetensors", marks=pytest.mark.nightly),
    ],
    ids=["ddp bf16 checkpointing", "fsdp2", "fsdp2 checkpointing", "ddp lora"],
)
def test_a_run_trains_saves_and_exports(
    tiny: Path, tmp_path: Path, strategy: dict[str, Any], arguments: dict[str, Any], checkpoint: str
) -> None:
    output = tmp_path / "output"
    train(tiny, output, strategy, arguments)
    lines = [line.metrics for line in read_metrics(output / "metrics.jsonl")[0] if line.metrics]
    assert [line["world_size"] for line in lines] == [2, 2, 2]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert max(line["sampling/sampling_logp_difference/max"] for line in lines) < 0.1
    assert (output / "checkpoint-2" / checkpoint).exists()
    trained, before = (AutoModelForCausalLM.from_pretrained(folder) for folder in (output / "model", tiny))
    moved = [not left.equal(right) for left, right in zip(trained.parameters(), before.parameters(), strict=False)]
    assert "lora" in arguments or any(moved)
