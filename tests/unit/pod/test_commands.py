"""The generator's command line follows the job: how many engines, and how many completions each has under way."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from otj_runtime.api import OnlineTrainingJob
from otj_runtime.pod.commands import ADAPTED_LAYERS, PROBE_ROOM, generator_command, generator_environment, shared_environment
from otj_runtime.pod.config import resolve


def job_of(spec: dict[str, Any]) -> OnlineTrainingJob:
    """A job with what every job must have, and `spec`."""
    base = {"algorithm": "GRPO", "model": {"name": "builtin/tiny-copy"}, "dataset": {"task": "copy"}}
    return OnlineTrainingJob.model_validate(
        {"apiVersion": "onlinetraining.dev/v1alpha1", "kind": "OnlineTrainingJob", "metadata": {"name": "run"}, "spec": base | spec}
    )


def options(spec: dict[str, Any]) -> dict[str, str]:
    """Options of the generator's command that have a value."""
    job = job_of(spec)
    return dict(pairwise(generator_command(job, resolve(job))))


def test_accelerators_beyond_one_copy_of_the_model_hold_further_copies() -> None:
    command = options({"gpus": 8, "generation": {"gpus": 4, "tensorParallelSize": 2}})
    assert command["--tensor-parallel-size"] == "2"
    assert command["--data-parallel-size"] == "2"
    assert "--data-parallel-size" not in options({"gpus": 8, "generation": {"gpus": 4}})


def test_a_generator_of_an_adapter_loads_the_model_itself_and_makes_room_for_the_rank() -> None:
    command = options({"gpus": 2, "lora": {"rank": 20, "sync": "adapter"}})
    assert (command["--served-model-name"], command["--max-lora-rank"]) == ("base", "32")
    assert "--load-format" not in command
    merged = options({"gpus": 2, "lora": {"rank": 20}})
    assert (merged["--served-model-name"], merged["--load-format"]) == ("policy", "dummy")
    assert "--max-lora-rank" not in merged


@pytest.mark.parametrize(
    ("lora", "layers"), [({}, ADAPTED_LAYERS), ({"targetModules": ["q_proj", "lm_head"]}, ("q_proj", "lm_head"))], ids=["default", "named"]
)
def test_vllm_makes_room_for_the_adapted_layers_only(lora: dict[str, Any], layers: tuple[str, ...]) -> None:
    job = job_of({"gpus": 2, "lora": {"sync": "adapter", **lora}})
    command = generator_command(job, resolve(job))
    at = command.index("--lora-target-modules") + 1
    assert tuple(command[at : at + len(layers)]) == layers
    assert command[at + len(layers)].startswith("--")


@pytest.mark.parametrize(
    "name",
    ["HF_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "VLLM_CACHE_ROOT", "CUDA_CACHE_PATH", "FLASHINFER_WORKSPACE_BASE"],
)
def test_what_was_compiled_or_fetched_once_stays_on_the_output_volume(name: str) -> None:
    config = resolve(job_of({"gpus": 2, "output": {"path": "/results"}}))
    environment = shared_environment(config, scratch="/tmp") | generator_environment(config)
    assert Path(environment[name]).is_relative_to("/results")


@pytest.mark.parametrize(
    ("spec", "sequences"),
    [
        ({"gpus": 4}, 3 * 16),
        ({"gpus": 4, "rollout": {"staleness": 1}}, 2 * 3 * 16),
        ({"gpus": 6, "generation": {"gpus": 2, "tensorParallelSize": 1}}, 4 * 16 // 2),
        ({"gpus": 8, "rollout": {"staleness": 64}}, 1024),
    ],
)
def test_an_engine_is_sized_by_the_completions_it_has_under_way_and_the_probe(spec: dict[str, Any], sequences: int) -> None:
    training = {"per_device_train_batch_size": 16, "num_generations": 8}
    assert options(spec | {"training": training})["--max-num-seqs"] == str(sequences + PROBE_ROOM)


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        pytest.param({"gpus": 2}, "fork", id="one GPU"),
        pytest.param({"gpus": 4, "generation": {"gpus": 2}}, None, id="two workers"),
        pytest.param({"gpus": 2, "accelerator": {"device": "cpu"}}, None, id="a CPU"),
    ],
)
def test_an_engine_alone_on_its_gpu_is_forked_and_imports_nothing_again(spec: dict[str, Any], method: str | None) -> None:
    assert generator_environment(resolve(job_of(spec))).get("VLLM_WORKER_MULTIPROC_METHOD") == method


@pytest.mark.parametrize("wish", ["auto", "mailbox", "nccl", "ipc"])
def test_no_generator_unpickles_what_a_socket_brings(wish: str) -> None:
    config = resolve(job_of({"gpus": 2, "generation": {"weightTransfer": wish}}))
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in generator_environment(config)
