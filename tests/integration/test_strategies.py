"""Whole runs on two CPU ranks under `accelerate launch`, completions from the model itself, one row per way to spread the model."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from otj_runtime.api import parse_job
from otj_runtime.data.model import build_tiny
from otj_runtime.launch import accelerate
from otj_runtime.pod.config import resolve
from otj_runtime.pod.metrics import read_metrics
from tests.integration.conftest import VLLM_CACHE
from tests.integration.deadlines import HANG_SECONDS
from tests.unit.api.specs import changed

pytestmark = pytest.mark.integration

DEEPSPEED = (pytest.mark.nightly, pytest.mark.deepspeed)

LORA: dict[str, Any] = {"lora": {"rank": 4}, "beta": 0.1}
"""An adapter, whose reference is the policy without it."""

WITH_VLLM: dict[str, Any] = {
    "use_vllm": True,
    "vllm_max_model_len": 32,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 16,
}
"""Completions from a server that rank 0 starts, whose weights come from both ranks' pieces."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny(folder)
    return folder


def train(tiny: Path, output: Path, strategy: dict[str, Any], arguments: dict[str, Any]) -> None:
    """One run of strategy_rank.py, as the launcher would start it."""
    output.mkdir(exist_ok=True)  # a run that goes on finds its checkpoints there
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
    environment = os.environ | accelerate.environment(keys, threads=1) | {"VLLM_CACHE_ROOT": str(VLLM_CACHE)}
    subprocess.run(command, env=environment, timeout=HANG_SECONDS, check=True)


@pytest.mark.parametrize(
    ("strategy", "arguments", "checkpoint"),
    [
        ({"strategy": "ddp", "mixedPrecision": "bf16"}, {"bf16": True, "gradient_checkpointing": True}, "model.safetensors"),
        ({"strategy": "fsdp2"}, {}, "pytorch_model_fsdp_0"),
        pytest.param({"strategy": "fsdp2"}, {"gradient_checkpointing": True}, "pytorch_model_fsdp_0", marks=pytest.mark.nightly),
        pytest.param({"strategy": "ddp"}, LORA, "adapter_model.safetensors", marks=pytest.mark.nightly),
        pytest.param({"strategy": "deepspeed-zero3"}, WITH_VLLM, "global_step2", marks=DEEPSPEED),
    ],
    ids=["ddp bf16 checkpointing", "fsdp2", "fsdp2 checkpointing", "ddp lora", "zero3 vllm"],
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


@pytest.fixture(scope="module", params=["fsdp2", pytest.param("deepspeed-zero3", marks=DEEPSPEED)])
def sharding(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A strategy that cuts the model into pieces."""
    return {"strategy": request.param}


@pytest.fixture(scope="module")
def sharded_adapter(tiny: Path, sharding: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of an adapter left: one run for all tests that only look at it."""
    output = tmp_path_factory.mktemp("adapter") / "output"
    train(tiny, output, sharding, LORA)
    return output


def adapter_of(output: Path) -> dict[str, torch.Tensor]:
    """The exported adapter, by PEFT's names."""
    adapter: dict[str, torch.Tensor] = load_file(output / "model" / "adapter_model.safetensors")
    return adapter


def test_a_sharded_adapter_is_exported_whole_alone_and_merged(tiny: Path, sharded_adapter: Path) -> None:
    assert any(bool(tensor.any()) for name, tensor in adapter_of(sharded_adapter).items() if "lora_B" in name)
    base, merged = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny, sharded_adapter / "merged"))
    adapted = PeftModel.from_pretrained(base, str(sharded_adapter / "model")).merge_and_unload()
    for (name, ours), (other, theirs) in zip(merged.named_parameters(), adapted.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_sharded_adapter_goes_on_from_its_checkpoint_to_where_it_would_have_been(
    tiny: Path, tmp_path: Path, sharding: dict[str, Any], sharded_adapter: Path
) -> None:
    resumed = tmp_path / "resumed"
    shutil.copytree(sharded_adapter / "checkpoint-2", resumed / "checkpoint-2")
    train(tiny, resumed, sharding, LORA)
    assert [line.step for line in read_metrics(resumed / "metrics.jsonl")[0]] == [3]
    assert_same(adapter_of(resumed), adapter_of(sharded_adapter), atol=0)


@pytest.mark.nightly
def test_an_adapter_learns_the_same_however_the_model_is_spread(tiny: Path, tmp_path: Path, sharded_adapter: Path) -> None:
    train(tiny, tmp_path / "ddp", {"strategy": "ddp"}, LORA)
    assert_same(adapter_of(tmp_path / "ddp"), adapter_of(sharded_adapter), atol=1e-6)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, atol: float) -> None:
    """Two adapters are equal up to `atol` in each element."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=atol, rtol=0)
